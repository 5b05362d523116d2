"""Final losses of a small byte-level GPT by optimizer and learning rate: ``docs/tuning.md``.

    python scripts/option_rates.py --seeds 3 --output benchmarks/results/DATE-cpu-options.json

Plain PyTorch on one thread; the text is the sources of the Python library. Every run of a seed has
the same weights and batches.
"""

import argparse
import json
import math
import sysconfig
from pathlib import Path
from statistics import mean

import torch
from torch import nn

from megatron_came import CAME

LENGTH, BATCH, WIDTH, LAYERS = 64, 16, 64, 2
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
BETAS = {"betas": (0.9, 0.95, 0.995)}
OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, betas=(0.9, 0.95), weight_decay=0.0),
    "CAME": lambda params: CAME(params, lr=1.0, **BETAS),
    "CAME, default betas": lambda params: CAME(params, lr=1.0),
    "CAME, default betas, bias correction": lambda params: CAME(
        params, lr=1.0, bias_correction=True
    ),
    "CAME, bias correction": lambda params: CAME(params, lr=1.0, bias_correction=True, **BETAS),
    "CAME, cautious": lambda params: CAME(params, lr=1.0, cautious=True, **BETAS),
    "CAME, no confidence": lambda params: CAME(params, lr=1.0, no_confidence=True, **BETAS),
}


class Model(nn.Module):
    """A GPT on bytes, of 0.12 million weights."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), False)
        self.mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        for param in self.parameters():
            if param.dim() > 1:
                nn.init.normal_(param, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of the next bytes, (batch, LENGTH, 256)."""
        x = self.bytes(tokens) + self.places.weight
        return self.layers(x, mask=self.mask, is_causal=True) @ self.bytes.weight.T


def text() -> torch.Tensor:
    """The library's sources, one after another."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))), dtype=torch.uint8)


def final_loss(data: torch.Tensor, name: str, rate: float, warmup: int, seed: int, iterations: int):
    """The mean loss of the last 20 iterations."""
    torch.manual_seed(seed)
    model, losses = Model(), []
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    for done in range(iterations):
        decay = 0.55 + 0.45 * math.cos(math.pi * done / iterations)
        for group in optimizer.param_groups:
            group["lr"] = rate * min((done + 1) / max(warmup, 1), 1.0) * decay
        places = torch.randint(len(data) - LENGTH - 1, (BATCH,))
        batch = torch.stack([data[at : at + LENGTH + 1] for at in places.tolist()]).long()
        loss = nn.functional.cross_entropy(
            model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return mean(losses[-20:])


def main() -> None:
    """Train all of them and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--warmup", type=int, nargs="+", default=[30])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--only", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, rows = text(), []
    for name in args.only:
        for warmup in args.warmup:
            for rate in args.rates:
                losses = [
                    final_loss(data, name, rate, warmup, seed, args.iterations)
                    for seed in range(args.seeds)
                ]
                rows.append({"optimizer": name, "warmup": warmup, "rate": rate, "losses": losses})
                spread = f"{min(losses):.3f} to {max(losses):.3f}"
                print(
                    f"| {name} | {warmup} | {rate:g} | {mean(losses):.3f} | {spread} |", flush=True
                )
                if args.output:
                    about = {"torch": torch.__version__, "iterations": args.iterations}
                    args.output.write_text(json.dumps({**about, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
