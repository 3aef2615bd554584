"""llama.cpp as it works inside a server: requests of unequal length in shared batches.

    python benchmarks/llama_cpp_batches.py MODEL.gguf THREADS

Needs llama-cpp-python, and runs in an environment of its own (`serve_cpu.py --llama-python`). It reads lines of
JSON, `[[prompt, new tokens], …]` with prompts as token ids, and answers each with `{"seconds": …, "tokens":
…}`. Prompts and new tokens of different requests share batches of at most `BATCH` tokens, as in llama.cpp's own
server. The likeliest token is taken, and the end of the text is ignored.

The embeddings, which are the output layer too, are first rounded to 8 bits (`MODEL-8bit-head.gguf`), as fewbit
does while running. The other weights stay the same.
"""

import json
import os
import sys
import time

import llama_cpp
import numpy as np

BATCH = 512
MOST_REQUESTS, CONTEXT = 64, 16384


class Batches:
    """A model with one key-value cache for all requests."""

    def __init__(self, path: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), options)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = CONTEXT, BATCH, BATCH
        options.n_seq_max, options.n_threads, options.n_threads_batch = MOST_REQUESTS, threads, threads
        options.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot run {path}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def answer(self, requests: list[tuple[list[int], int]]) -> dict[str, float]:
        """Generate for all requests; returns the time and the number of new tokens."""
        memory = llama_cpp.llama_get_memory(self.context)
        llama_cpp.llama_memory_clear(memory, True)
        started = time.perf_counter()
        waiting = [list(prompt) for prompt, _ in requests]  # tokens that were not computed yet
        position = [0] * len(requests)
        made = [0] * len(requests)
        while any(waiting):
            last = self._fill(waiting, position)
            if llama_cpp.llama_decode(self.context, self.batch):
                raise SystemExit("llama_decode failed")
            for index, row in last.items():
                logits = llama_cpp.llama_get_logits_ith(self.context, row)
                token = int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())
                made[index] += 1
                if made[index] < requests[index][1]:
                    waiting[index] = [token]
                else:
                    llama_cpp.llama_memory_seq_rm(memory, index, -1, -1)
        return {"seconds": time.perf_counter() - started, "tokens": sum(made)}

    def _fill(self, waiting: list[list[int]], position: list[int]) -> dict[int, int]:
        """Move waiting tokens into the batch, requests with the fewest first: new tokens before prompts.

        Returns:
            Request → row of its last token, of those that are complete.
        """
        used, last = 0, {}
        for index in sorted(range(len(waiting)), key=lambda i: len(waiting[i])):
            count = min(len(waiting[index]), BATCH - used)
            for token in waiting[index][:count]:
                self.batch.token[used] = token
                self.batch.pos[used] = position[index]
                self.batch.n_seq_id[used] = 1
                self.batch.seq_id[used][0] = index
                self.batch.logits[used] = False
                position[index] += 1
                used += 1
            del waiting[index][:count]
            if count and not waiting[index]:
                self.batch.logits[used - 1] = True
                last[index] = used - 1
        self.batch.n_tokens = used
        return last


def with_8bit_head(path: str) -> str:
    """The path of the model with embeddings in 8 bits, written if it is missing."""
    target = path.removesuffix(".gguf") + "-8bit-head.gguf"
    if not os.path.exists(target):
        options = llama_cpp.llama_model_quantize_default_params()
        # Weights that are in this type already are copied.
        options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
        options.token_embedding_type = options.output_tensor_type = llama_cpp.GGML_TYPE_Q8_0
        if llama_cpp.llama_model_quantize(path.encode(), target.encode(), options):
            raise SystemExit(f"llama.cpp cannot write {target}")
    return target


def main() -> None:
    batches = Batches(with_8bit_head(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(batches.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
