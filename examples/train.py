"""Trains a small byte-level transformer on the Python standard library's sources, and saves it with ckptd as it goes.

What a user writes is in `main`: one import, `connect`, `async_save`, `load`. Events are printed as JSON lines, so that
`demo.py` can watch; run it alone with ``python examples/train.py --directory /tmp/run``.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import ckptd.client as dcp

CONTEXT_BYTES = 128
BATCH = 8
TEXT_BYTES = 4_000_000


class ByteTransformer(nn.Module):
    """A decoder-only transformer over bytes: input ``[batch, length]`` int64, output ``[batch, length, 256]``."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.place = nn.Parameter(torch.zeros(CONTEXT_BYTES, width))
        block = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.out = nn.Linear(width, 256)

    def forward(self, data: Tensor) -> Tensor:
        """Return logits for the next byte at each place."""
        length = data.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden: Tensor = self.blocks(self.embed(data) + self.place[:length], mask=mask, is_causal=True)
        logits: Tensor = self.out(hidden)
        return logits


def text() -> Tensor:
    """Return some MB of the standard library's own sources, as bytes."""
    library = Path(sysconfig.get_paths()["stdlib"])
    data = b""
    for path in sorted(library.glob("*.py")):
        data += path.read_bytes()
        if len(data) > TEXT_BYTES:
            break
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def batches(data: Tensor, first_step: int) -> Iterator[Tensor]:
    """Yield batches ``[BATCH, CONTEXT_BYTES + 1]``; a step's batch depends on nothing but the step."""
    step = first_step
    while True:
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(data) - CONTEXT_BYTES - 1, (BATCH,), generator=generator)
        yield torch.stack([data[start : start + CONTEXT_BYTES + 1] for start in starts.tolist()])
        step += 1


def digest(state: dict[str, Any]) -> str:
    """Return a hash of every tensor's bits in a state dict, in the order of the names."""
    flat: dict[str, Tensor] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}.{key}", inner)
        elif isinstance(value, Tensor):
            flat[name] = value

    walk("", state)
    total = xxhash.xxh3_128()
    for name in sorted(flat):
        total.update(name.encode())
        total.update(flat[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def say(event: str, **facts: object) -> None:
    """Print one event as a JSON line."""
    print(json.dumps({"event": event, **facts}), flush=True)


def newest(directory: Path) -> Path | None:
    """Return the newest checkpoint: what can be listed is complete."""
    found = sorted(directory.glob("step-*"))
    return found[-1] if found else None


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=4, help="save every so many steps")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    return parser.parse_args()


def main() -> None:
    """Train from the newest checkpoint, or from the start."""
    options = arguments()
    torch.manual_seed(0)
    model = ByteTransformer(options.width, options.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def state(step: int) -> dict[str, Any]:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        return {"model": model_state, "optimizer": optimizer_state, "step": step}

    first = 0
    checkpoint = newest(options.directory)
    if checkpoint is not None:
        loaded = state(0)
        dcp.load(loaded, checkpoint_id=checkpoint)
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        first = loaded["step"]
        say("resumed", step=first, digest=digest(state(first)))
    session = dcp.connect(state(first))
    say("connected", daemon_pid=session.daemon_pid, runtime=session.runtime_dir)

    last: dcp.SaveFuture | None = None
    for step, batch in zip(range(first + 1, options.steps + 1), batches(text(), first), strict=False):
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        say("step", step=step, loss=loss.item())
        if step % options.every == 0:
            current = state(step)
            bits = digest(current)
            last = dcp.async_save(current, checkpoint_id=options.directory / f"step-{step:06d}")
            say("staged", step=step, digest=bits, stall_s=last.stall_s, bytes=last.progress.bytes_total)
    if last is not None:
        last.result()
    say("done")


if __name__ == "__main__":
    main()
