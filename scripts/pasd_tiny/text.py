"""The tokenizer: CLIP's byte-pair encoding, cut off after its most frequent merges."""

import gzip
import json
import zipfile
from pathlib import Path

from torch import Tensor, nn
from transformers import CLIPTokenizer

from sdconvert.io.files import atomic_folder

_MERGES = 1500
_START, _END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(wheel: Path, folder: Path) -> None:
    """Cut the vocabulary in the `open_clip_torch` wheel down and save it as `CLIPTokenizer` does.

    Args:
        wheel: Downloaded with `pip download --no-deps open_clip_torch==3.3.0`; holds CLIP's list of merges.
        folder: Written; vocab.json and merges.txt serve older transformers, tokenizer.json newer ones.
    """
    with zipfile.ZipFile(wheel) as archive:
        packed = archive.read("open_clip/bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(packed).decode().splitlines()[1 : _MERGES + 1]
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    symbols = _byte_symbols()
    tokens = symbols + [f"{symbol}</w>" for symbol in symbols] + ["".join(pair) for pair in merges] + [_START, _END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)  # type: ignore[arg-type]
    with atomic_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        (temporary / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        (temporary / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")


def encode(tokenizer: CLIPTokenizer, text_encoder: nn.Module, captions: list[str]) -> Tensor:
    """Last hidden states of captions, (N, 77, width)."""
    tokens = tokenizer(
        captions,
        padding="max_length",
        max_length=77,
        truncation=True,
        return_tensors="pt",
    )
    device = next(text_encoder.parameters()).device
    states: Tensor = text_encoder(tokens.input_ids.to(device))[0]
    return states


def _byte_symbols() -> list[str]:
    """The 256 printable characters that stand for bytes in byte-level BPE, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
