"""A program of its own that runs one GGUF file in llama.cpp. It imports nothing of the studio: llama.cpp may abort, and
takes its process with it.

    python -I run_llama_cpp.py LIBRARY MODEL < question.json      → answers.json and logits.f32 in question["out"]

Everything that decides about precision is set to the most exact: float32 keys and values, no flash attention, one batch
a prompt, weights as the file holds them. llama.cpp is called through the C interface of the library inside xllamacpp.
"""

import ctypes
import json
import resource
import sys
from collections.abc import Iterator
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint8, c_uint32, c_void_p
from pathlib import Path
from typing import Any, BinaryIO


class ModelParams(ctypes.Structure):
    """The start of `struct llama_model_params`; the spare end is for what later versions add.

    Structures as large as these are passed through memory, so a longer one than the library's does no harm.
    """

    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("spare", c_uint8 * 256),
    ]


class ContextParams(ctypes.Structure):
    """The start of `struct llama_context_params`."""

    _fields_ = [
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")),
        *((name, c_int32) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("spare", c_uint8 * 256),
    ]


class Batch(ctypes.Structure):
    """`struct llama_batch`."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


RESULTS = {
    "llama_version": c_char_p,
    "llama_model_default_params": ModelParams,
    "llama_context_default_params": ContextParams,
    "llama_model_load_from_file": c_void_p,
    "llama_init_from_model": c_void_p,
    "llama_model_get_vocab": c_void_p,
    "llama_get_memory": c_void_p,
    "llama_adapter_lora_init": c_void_p,
    "llama_get_logits_ith": POINTER(c_float),
    "llama_vocab_is_eog": c_bool,
    "llama_vocab_get_add_bos": c_bool,
    "llama_vocab_get_add_eos": c_bool,
    "llama_model_chat_template": c_char_p,
}
POINTERS_FIRST = [
    "llama_init_from_model",
    "llama_model_get_vocab",
    "llama_get_memory",
    "llama_adapter_lora_init",
    "llama_get_logits_ith",
    "llama_vocab_is_eog",
    "llama_vocab_get_add_bos",
    "llama_vocab_get_add_eos",
    "llama_model_chat_template",
    "llama_vocab_bos",
    "llama_vocab_eos",
    "llama_vocab_eot",
    "llama_vocab_pad",
    "llama_vocab_n_tokens",
    "llama_decode",
    "llama_memory_clear",
    "llama_tokenize",
    "llama_token_to_piece",
    "llama_set_adapters_lora",
]


class LlamaCpp:
    """The library, with the types of its functions."""

    def __init__(self, path: str):
        self.library = ctypes.CDLL(path)
        self.library.llama_backend_init()

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.library, name)
        function.restype = RESULTS.get(name, c_int32)

        def call(first: Any = None, *rest: Any) -> Any:
            if first is None:
                return function()
            return function(c_void_p(first) if name in POINTERS_FIRST else first, *rest)

        return call


def check_layout(model: ModelParams, context: ContextParams) -> None:
    """The defaults must stand where this program writes: another version of llama.cpp would be run wrongly."""
    found = (context.n_ctx, context.flash_attn_type, context.type_k, context.type_v, context.defrag_thold)
    if found != (512, -1, 1, 1, -1.0) or model.n_gpu_layers != -1 or not model.use_extra_bufts or model.vocab_only:
        sys.exit("the parameters of this llama.cpp lie elsewhere; install the pinned xllamacpp (make export-tools)")


class Model:
    """One loaded model and the context for prompts of up to `length` tokens; without a length the vocabulary alone."""

    def __init__(self, llama: LlamaCpp, path: str, length: int, threads: int, lora: str | None, lora_scale: float):
        self.llama, self.length, self.threads = llama, length, threads
        model, context = llama.llama_model_default_params(), llama.llama_context_default_params()
        check_layout(model, context)
        model.n_gpu_layers, model.use_extra_bufts, model.check_tensors = 0, False, True
        model.vocab_only = not length
        self.model = llama.llama_model_load_from_file(path.encode(), model) or sys.exit("llama.cpp refuses the model")
        self.vocab = llama.llama_model_get_vocab(self.model)
        self.size = llama.llama_vocab_n_tokens(self.vocab)
        self.context = self.new_context(context) if length else None
        if lora:
            self.add_lora(lora, lora_scale)

    def new_context(self, params: ContextParams) -> int:
        params.n_ctx = params.n_batch = params.n_ubatch = params.n_outputs_max_per_seq = self.length
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type, params.type_k, params.type_v = 0, 0, 0  # off, float32, float32
        made: int | None = self.llama.llama_init_from_model(self.model, params)
        return made or sys.exit("llama.cpp makes no context")

    def add_lora(self, path: str, scale: float) -> None:
        self.lora = self.llama.llama_adapter_lora_init(self.model, path.encode()) or sys.exit("it refuses the LoRA")
        adapters, scales = (c_void_p * 1)(self.lora), (c_float * 1)(scale)
        if self.llama.llama_set_adapters_lora(self.context, adapters, c_size_t(1), scales):
            sys.exit("llama.cpp does not apply the LoRA")

    def clear(self) -> None:
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), c_bool(True))

    def decode(self, tokens: list[int], start: int) -> Iterator[Any]:
        """Logits (as bytes, float32) after each of the tokens, which stand at `start` and after."""
        count = len(tokens)
        one = (c_int32 * 1)(0)
        batch = Batch(
            count,
            (c_int32 * count)(*tokens),
            None,
            (c_int32 * count)(*range(start, start + count)),
            (c_int32 * count)(*[1] * count),
            (POINTER(c_int32) * count)(*[ctypes.cast(one, POINTER(c_int32))] * count),
            (c_int8 * count)(*[1] * count),
        )
        if code := self.llama.llama_decode(self.context, batch):
            sys.exit(f"llama_decode says {code}")
        for place in range(count):
            yield self.llama.llama_get_logits_ith(self.context, c_int32(place))

    def logits(self, tokens: list[int], file: BinaryIO) -> None:
        self.clear()
        for row in self.decode(tokens, 0):
            file.write(ctypes.string_at(row, self.size * 4))

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """Up to `count` tokens after `tokens`, each the likeliest, until one that ends generation."""
        self.clear()
        made: list[int] = []
        rows, place = list(self.decode(tokens, 0)), len(tokens)
        for _ in range(count):
            row = rows[-1]
            made.append(max(range(self.size), key=row[: self.size].__getitem__))
            if self.llama.llama_vocab_is_eog(self.vocab, c_int32(made[-1])):
                break
            rows, place = list(self.decode(made[-1:], place)), place + 1
        return made

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        raw = text.encode()
        room = len(raw) + 8
        out = (c_int32 * room)()
        flags = (c_bool(add_special), c_bool(True))
        return out[: self.llama.llama_tokenize(self.vocab, raw, len(raw), out, room, *flags)]

    def text(self, tokens: list[int]) -> str:
        """As a server streams it: piece after piece, special tokens written out."""
        return b"".join(map(self.piece, tokens)).decode("utf-8", "replace")

    def piece(self, token: int) -> bytes:
        out = ctypes.create_string_buffer(1024)
        flags = (c_int32(len(out)), c_int32(0), c_bool(True))
        return out.raw[: self.llama.llama_token_to_piece(self.vocab, c_int32(token), out, *flags)]

    def facts(self) -> dict[str, Any]:
        one = {name: getattr(self.llama, f"llama_vocab_{name}")(self.vocab) for name in ("bos", "eos", "eot", "pad")}
        ends = [token for token in range(self.size) if self.llama.llama_vocab_is_eog(self.vocab, c_int32(token))]
        template = self.llama.llama_model_chat_template(self.model, None)
        return {
            **one,
            "add_bos": self.llama.llama_vocab_get_add_bos(self.vocab),
            "add_eos": self.llama.llama_vocab_get_add_eos(self.vocab),
            "vocab_size": self.size,
            "end_of_generation": ends,
            "chat_template": template.decode() if template is not None else None,
        }


def main(library: str, path: str) -> None:
    question = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (question["memory_bytes"],) * 2)
    out, prompts = Path(question["out"]), question["prompts"]
    greedy = question["greedy_tokens"]
    length = max((len(prompt) for prompt in prompts), default=0) + greedy * bool(prompts)
    llama = LlamaCpp(library)
    model = Model(llama, path, length, question["threads"], question["lora"], question["lora_scale"])
    with (out / "logits.f32").open("wb") as file:
        for prompt in prompts:
            model.logits(prompt, file)
    made = [model.greedy(prompt, greedy) for prompt in prompts] if greedy else []
    answers = {
        "version": llama.llama_version().decode(),
        "facts": model.facts(),
        "tokens": [model.tokenize(text, False) for text in question["texts"]],
        "tokens_with_special": [model.tokenize(text, True) for text in question["texts"]],
        "greedy": made,
        "greedy_texts": [model.text(tokens) for tokens in made],
    }
    (out / "answers.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
