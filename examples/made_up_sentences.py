"""Write made-up sentences and their tokenizer: Megatron has no --mock-data for BERT and T5.

python examples/made_up_sentences.py FOLDER VOCABULARY

FOLDER/sentences is the dataset, with several sentences a document, and FOLDER/tokenizer a folder
of a Hugging Face tokenizer: WordPiece of that many tokens, BERT's five special ones among them.
"""

import json
import sys
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

DOCUMENTS, SENTENCES, LENGTH = 100, 16, 24

folder, size = Path(sys.argv[1]), int(sys.argv[2])
special = [f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")]
words = [f"w{number}" for number in range(len(special), size)]
tokenizer = folder / "tokenizer"
tokenizer.mkdir(parents=True, exist_ok=True)
(tokenizer / "vocab.txt").write_text("\n".join(special + words) + "\n")
(tokenizer / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))

random = np.random.default_rng(0)
builder = IndexedDatasetBuilder(f"{folder}/sentences.bin", dtype=DType.optimal_dtype(size))
for _ in range(DOCUMENTS):
    starts = random.integers(len(special), size - LENGTH, (SENTENCES, 1))
    builder.add_document((starts + np.arange(LENGTH)).reshape(-1), [LENGTH] * SENTENCES)
builder.finalize(f"{folder}/sentences.idx")
