"""Token ids as text, and what kind of token each is, read from a tokenizer.json without loading a tokenizer library."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

KINDS = ("result", "number", "operator", "equals", "punctuation", "word", "word part", "space", "special", "other")
KIND_NOTES = {
    "result": "digits after an equals sign", "number": "other digits", "operator": "+ - * / < > and the like", "equals": "=",
    "punctuation": "marks between words and steps", "word": "starts with a letter at the beginning of a word",
    "word part": "letters inside a word", "space": "blanks and line ends", "special": "end of text and other control tokens",
    "other": "anything else",
}  # fmt: skip
_OPERATOR = re.compile(r"[+\-*/^<>×÷·±%|&~]+")
_NUMBER = re.compile(r"[0-9]+(?:[.,][0-9]+)*")


@dataclass(frozen=True)
class Vocabulary:
    """pieces: text of each id ("" where unknown); special: ids of control tokens."""

    pieces: tuple[str, ...]
    special: frozenset[int]

    def text(self, token_id: int) -> str:
        """The token's text; an id outside the vocabulary shows as its number."""
        if 0 <= token_id < len(self.pieces) and self.pieces[token_id]:
            return self.pieces[token_id]
        return f"[{token_id}]"

    def kinds(self, ids: Iterable[int]) -> dict[int, str]:
        """Kind of each distinct id, looking at the token alone ("result" needs the context: see `kinds_in_context`)."""
        return {int(i): "special" if int(i) in self.special else kind_of(self.text(int(i))) for i in ids}


def kind_of(piece: str) -> str:
    """One of KINDS for a token's text. A leading blank marks the start of a word; a lone capital or a run of letters is a word."""
    bare = piece.strip()
    if not bare:
        return "space" if piece else "other"
    if _NUMBER.fullmatch(bare):
        return "number"
    if bare in ("=", "==", "≈", "≡"):
        return "equals"
    if _OPERATOR.fullmatch(bare):
        return "operator"
    if bare[0].isalpha():
        starts = piece[0].isspace() or bare[0].isupper()
        return "word" if starts else "word part"
    if all(not c.isalnum() for c in bare):
        return "punctuation"
    return "other"


def kinds_in_context(ids_T: np.ndarray, starts_T: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """[T] object array of KINDS: a number whose run of numbers follows an equals sign is a "result".

    ids_T: token ids, responses one after another; starts_T bool: first token of a response.
    """
    unique, inverse = np.unique(ids_T, return_inverse=True)
    by_id = vocabulary.kinds(unique)
    kinds_T = np.array([by_id[int(i)] for i in unique], object)[inverse]
    is_number, is_equals = kinds_T == "number", kinds_T == "equals"
    is_space = kinds_T == "space"
    # The last token that is neither number nor blank decides; carry its position forward.
    position = np.where(~(is_number | is_space) | starts_T, np.arange(len(ids_T)), -1)
    last = np.maximum.accumulate(position) if len(position) else position
    after_equals = np.zeros(len(ids_T), bool)
    known = last >= 0
    after_equals[known] = is_equals[last[known]]
    kinds_T[is_number & after_equals] = "result"
    return kinds_T


def load_vocabulary(directories: Sequence[str | Path | None]) -> Vocabulary | None:
    """The vocabulary of the first directory that holds a readable tokenizer.json, None when there is none."""
    for directory in directories:
        path = Path(directory) / "tokenizer.json" if directory else None
        if path is None or not path.is_file():
            continue
        try:
            content = orjson.loads(path.read_bytes())
            return from_tokenizer_json(content)
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            continue
    return None


def from_tokenizer_json(content: dict) -> Vocabulary:
    """Pieces of a tokenizers JSON: WordLevel, BPE and WordPiece (a dict), Unigram (a list); byte-level pieces are decoded."""
    raw = content["model"]["vocab"]
    entries = {piece: i for i, (piece, _) in enumerate(raw)} if isinstance(raw, list) else dict(raw)
    added = {int(token["id"]): token for token in content.get("added_tokens") or []}
    size = max([*entries.values(), *added], default=-1) + 1
    pieces = [""] * size
    decode = _decoder(content)
    for piece, token_id in entries.items():
        pieces[token_id] = decode(piece)
    for token_id, token in added.items():
        pieces[token_id] = token["content"]
    special = {i for i, token in added.items() if token.get("special")}
    special |= {i for i, piece in enumerate(pieces) if re.fullmatch(r"<[|/]?\w+[|]?>", piece)}
    return Vocabulary(tuple(pieces), frozenset(special))


def _decoder(content: dict):
    parts = [content.get("decoder") or {}, content.get("pre_tokenizer") or {}]
    types = {p.get("type") for part in parts for p in [part, *(part.get("decoders") or []), *(part.get("pretokenizers") or [])]}
    if "ByteLevel" in types:
        table = _byte_level_table()

        def decode(piece: str) -> str:
            data = bytes(table[c] for c in piece if c in table)
            text = data.decode("utf-8", errors="replace")
            return text if "�" not in text else "".join(f"\\x{b:02x}" for b in data)

        return decode
    if "Metaspace" in types or "▁" in "".join(list(content["model"]["vocab"])[:2000] if isinstance(content["model"]["vocab"], dict) else []):
        return lambda piece: piece.replace("▁", " ")
    return lambda piece: piece


def _byte_level_table() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE: printable Latin-1 stands for itself, the rest follow from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    table = {chr(b): b for b in printable}
    spare = 0x100
    for b in range(256):
        if b not in printable:
            table[chr(spare)] = b
            spare += 1
    return table
