"""Causal language models of transformers, split into a trunk (token ids to last hidden states) and a head (hidden states to logits).

The split is what lets two models be compared with one resident at a time: a hidden state is some thousand numbers, a logit row some
hundred thousand. torch and transformers are imported inside the functions. Shapes: B batch, P padded positions, R rows, H hidden, V vocab.
"""

import gc
import hashlib
import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np

from ta_opd.errors import ConfigError, DataError

DTYPES = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16", "fp16": "float16", "float32": "float32", "fp32": "float32",
          "float64": "float64"}  # fmt: skip


def import_transformers():
    """The transformers package, also beside a torchvision that was built for another torch (its Python part then only lacks two schemas)."""
    import torch

    try:
        import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            library.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_transformers.library = library  # its schemas go when it is collected
        for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
            del sys.modules[name]
        import_module("torchvision")
    return import_module("transformers")


def resolve_device(name: str):
    """torch.device of "auto" (first GPU, else CPU), "cpu", "cuda:1", ... ConfigError when there is no such device."""
    import torch

    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use auto, cpu or a lower number")
    return device


def resolve_dtype(name: str, device):
    """torch.dtype of "auto" (bfloat16 on GPU, float32 on CPU) or one of DTYPES. ConfigError on another name."""
    import torch

    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"dtype: expected auto or one of {', '.join(DTYPES)}, got {name!r}")
    return getattr(torch, DTYPES[name])


def tokenizer_fingerprint(path) -> str | None:
    """A short name of the tokenizer's vocabulary (token text to id), None when `path` holds no tokenizer that can be read."""
    try:
        vocabulary = load_tokenizer(path).get_vocab()
    except DataError:
        return None
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()[:16]


def load_tokenizer(path, trust_remote_code: bool = False):
    """The tokenizer at `path`. DataError when there is none."""
    try:
        return import_transformers().AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: no tokenizer can be loaded ({str(error).splitlines()[0][:160]})") from error


def check_tokenizers(student, teacher, allow_mismatch: bool, trust_remote_code: bool = False) -> str | None:
    """The shared tokenizer's fingerprint. DataError when the two vocabularies differ, unless allowed (then None)."""
    prints = [tokenizer_fingerprint(path) for path in (student, teacher)]
    if prints[0] != prints[1]:
        if allow_mismatch:
            return None
        raise DataError(
            f"the student's and the teacher's tokenizers differ ({student}: {prints[0]}, {teacher}: {prints[1]}); token ids must mean the "
            "same for both. If they do for the tokens of the bank, pass --allow-tokenizer-mismatch"
        )
    return prints[0]


class CausalModel:
    """One model on one device. `hidden` gives last hidden states, `head_logits` turns rows of them into float32 logits.

    Raises DataError when nothing loads from `path`.
    """

    def __init__(self, model, device, name: str = ""):
        self.model, self.device, self.name = model.eval(), device, name
        self.head = model.get_output_embeddings()
        if self.head is None:
            raise DataError(f"{name}: the model has no output embedding, so it gives no next-token distribution")
        self.vocab = int(self.head.weight.shape[0])
        self.plain_head = None  # unknown until `check_head`

    @classmethod
    def load(cls, path, *, device, dtype, trust_remote_code: bool = False) -> "CausalModel":
        auto = import_transformers().AutoModelForCausalLM
        try:
            model = auto.from_pretrained(str(path), dtype=dtype, trust_remote_code=trust_remote_code, low_cpu_mem_usage=True)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: no model can be loaded ({str(error).splitlines()[0][:200]})") from error
        return cls(model.to(device), device, str(path))

    def hidden(self, ids_BP):
        """[B, P, H] hidden states after the final norm. Rows are padded on the right, which a causal model does not look at."""
        return self.model.base_model(input_ids=ids_BP, use_cache=False).last_hidden_state

    def full_logits(self, ids_BP, rows):
        """[R, V] logits (float32 at least) by the model's own forward pass, at flat positions `rows` of [B * P]."""
        logits = self.model(input_ids=ids_BP, use_cache=False).logits
        logits = logits.reshape(-1, logits.shape[-1])[rows]
        return logits if logits.dtype.itemsize >= 4 else logits.float()

    def head_logits(self, hidden_RH):
        """[R, V] float32 (float64 for a float64 model) logits. Half-precision products are summed and kept in float32."""
        return head_logits(hidden_RH, self.head.weight, getattr(self.head, "bias", None))

    def check_head(self, ids_BP) -> bool:
        """Whether head_logits(hidden) is what the model itself computes (no scaling or soft cap on the way); remembered."""
        import torch

        if self.plain_head is None:
            few = ids_BP[:1, : min(8, ids_BP.shape[1])]
            own = self.model(input_ids=few, use_cache=False).logits[0].float()
            split = self.head_logits(self.hidden(few)[0]).float()
            coarse = self.head.weight.dtype in (torch.bfloat16, torch.float16)
            scale = own.abs().max().clamp_min(1.0)
            self.plain_head = bool((own - split).abs().max() <= scale * (3e-2 if coarse else 1e-4))
        return self.plain_head

    def free(self) -> None:
        """Gives the memory back; the model cannot be used afterwards."""
        import torch

        large = sum(p.numel() for p in self.model.parameters()) > 50_000_000
        self.model = self.head = None
        if large:  # modules hold reference cycles, and a collection takes seconds in a process that has imported all this
            gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def head_logits(hidden_RH, weight_VH, bias_V=None):
    """hidden @ weight.T (+ bias) in float32 at least: bf16 inputs on a GPU are multiplied as bf16 and accumulated to a float32 result."""
    import torch

    half = weight_VH.dtype in (torch.bfloat16, torch.float16)
    if half and hidden_RH.is_cuda:
        try:
            logits = torch.mm(hidden_RH.to(weight_VH.dtype), weight_VH.t(), out_dtype=torch.float32)
        except (TypeError, RuntimeError):  # a torch without out_dtype
            logits = torch.mm(hidden_RH.float(), weight_VH.t().float())
    elif half:
        logits = torch.mm(hidden_RH.float(), weight_VH.t().float())
    else:
        logits = torch.mm(hidden_RH.to(weight_VH.dtype), weight_VH.t())
    return logits if bias_V is None else logits + bias_V


def weight_bytes(path, dtype) -> int | None:
    """Bytes the model at `path` will take in `dtype`, from its safetensors headers; None when they cannot be read."""
    import torch

    total = 0
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        return None
    for file in files:
        try:
            with open(file, "rb") as handle:
                header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        except (OSError, ValueError):
            return None
        total += sum(int(np.prod(t["shape"])) for name, t in header.items() if name != "__metadata__")
    return total * torch.empty((), dtype=dtype).element_size()
