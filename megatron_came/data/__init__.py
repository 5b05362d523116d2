"""From text to Megatron's indexed datasets: corpus, tokenizer, dataset."""
