"""The demo's text: the Python documentation that ships with every interpreter, about a million bytes."""

import importlib
import inspect

import torch
from torch import Tensor

MODULES = (
    "argparse", "ast", "asyncio", "builtins", "collections", "concurrent.futures", "csv", "datetime", "decimal",
    "email.message", "enum", "fractions", "functools", "heapq", "http.client", "inspect", "io", "itertools", "json",
    "logging", "math", "multiprocessing", "os", "pathlib", "pickle", "random", "re", "shutil", "socket", "sqlite3",
    "ssl", "statistics", "string", "subprocess", "tarfile", "tempfile", "threading", "typing", "unittest",
    "urllib.request", "uuid", "xml.etree.ElementTree", "zipfile",
)  # fmt: skip


def documentation_bytes() -> Tensor:
    """(length,) uint8: the language reference's topics, then the docstrings of well-known modules."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    texts = [topics[name] for name in sorted(topics)]
    for name in MODULES:
        module = importlib.import_module(name)
        texts += [inspect.getdoc(module) or ""]
        for member in sorted(vars(module)):
            value = getattr(module, member)
            texts.append(inspect.getdoc(value) or "")
            if inspect.isclass(value):
                texts += [inspect.getdoc(vars(value)[method]) or "" for method in sorted(vars(value))]
    seen = dict.fromkeys(text for text in texts if len(text) > 80)
    return torch.frombuffer(bytearray("\n\n".join(seen).encode()), dtype=torch.uint8)


def random_windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` windows of `length` bytes and the bytes that follow each: inputs and targets, (count, length)."""
    starts = torch.randint(0, text.numel() - length, (count,), generator=generator)
    windows = torch.stack([text[start : start + length + 1] for start in starts.tolist()]).long()
    return windows[:, :-1], windows[:, 1:]
