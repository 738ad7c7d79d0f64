"""Serve generation requests with continuous batching and a paged KV cache: python examples/server.py

Requests arrive and leave at any step. Each step computes all running requests in one call: whole prompts of new
requests, one token of the others. The model is the GPT of gpt.py with random weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from gpt import GPT, Config, anyattn_attention
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import anyattn

PAGE_SIZE, TEMPERATURE = 16, 0.7


@dataclass
class Request:
    number: int
    tokens: Tensor  # the prompt, then also the answer
    count: int  # tokens still to generate
    generator: torch.Generator
    pages: Tensor | None = None  # pages[i] holds the tokens from i * PAGE_SIZE on
    cached: int = 0  # tokens whose keys and values are in the cache


class Server:
    def __init__(self, model: GPT, num_pages: int) -> None:
        self.model = model
        for layer, block in enumerate(model.blocks):
            block.attention.attention = partial(self.attend, layer)
        shape = (num_pages, PAGE_SIZE, model.config.nheads_kv, model.config.head_dim)
        self.cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in model.blocks]
        self.free = list(range(num_pages))
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the new keys and values into their pages; attend to the pages of each token's own request."""
        for pages, new in zip(self.cache[layer], (k, v), strict=True):
            pages.flatten(0, 1)[self.slots] = new[0]
        out = anyattn.attention_varlen(q[0], *self.cache[layer], self.cu_seqlens, None, causal=True, **self.tables)
        return out[None]

    def admit(self) -> None:
        """Move requests from the queue into the batch while the pool has pages for all of their tokens."""
        while self.waiting:
            need = -(-(len(self.waiting[0].tokens) + self.waiting[0].count) // PAGE_SIZE)
            if need > len(self.free):
                if self.running:
                    return
                raise ValueError(f"num_pages must be {need} or more for this request, got {len(self.free)}")
            request = self.waiting.pop(0)
            request.pages = torch.tensor([self.free.pop() for _ in range(need)], dtype=torch.int32)
            self.running.append(request)

    def pack(self) -> tuple[Tensor, Tensor]:
        """Return the new tokens of all requests in one row and their positions; set what `attend` needs."""
        new = [torch.arange(r.cached, len(r.tokens)) for r in self.running]  # positions of the new tokens
        tokens = torch.cat([r.tokens[r.cached :] for r in self.running])
        pages = [r.pages[positions // PAGE_SIZE] for r, positions in zip(self.running, new, strict=True)]
        self.slots = torch.cat(pages) * PAGE_SIZE + torch.cat(new) % PAGE_SIZE
        for request in self.running:
            request.cached = len(request.tokens)
        self.cu_seqlens = torch.tensor([0, *map(len, new)]).cumsum(0, dtype=torch.int32)
        lengths = torch.tensor([r.cached for r in self.running], dtype=torch.int32)
        self.tables = {"block_table": pad_sequence([r.pages for r in self.running], True), "seqused_k": lengths}
        return tokens[None], torch.cat(new)

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Generate one token of every running request; return the requests that are complete."""
        self.admit()
        tokens, positions = self.pack()
        logits = self.model(tokens, positions=positions)[0, self.cu_seqlens[1:] - 1]
        for request, probabilities in zip(self.running, torch.softmax(logits / TEMPERATURE, -1), strict=True):
            new = torch.multinomial(probabilities, 1, generator=request.generator)
            request.tokens, request.count = torch.cat([request.tokens, new]), request.count - 1
        complete = [request for request in self.running if not request.count]
        self.running = [request for request in self.running if request.count]
        self.free += [int(page) for request in complete for page in request.pages]
        return complete


def random_model(context: int) -> GPT:
    """Return a model whose random weights are so large that its text depends strongly on attention."""
    torch.manual_seed(0)
    model = GPT(Config(vocab_size=64, context=context), anyattn_attention)
    model.load_state_dict({name: x * (10 if x.ndim > 1 else 1) for name, x in model.state_dict().items()})
    return model


def main(requests: int = 12, num_pages: int = 40, context: int = 256) -> None:
    server, alone = Server(random_model(context), num_pages), random_model(context)
    sizes = torch.randint(1, context // 2, (requests, 2), generator=torch.Generator().manual_seed(1)).tolist()
    sampling = [torch.Generator().manual_seed(i) for i in range(requests)]
    arriving = [Request(i, torch.randint(64, (sizes[i][0],)), sizes[i][1], sampling[i]) for i in range(requests)]
    step, complete = 0, 0
    while complete < requests:
        if step % 3 == 0 and arriving:
            server.waiting.append(arriving.pop(0))
        for request in server.step() if server.waiting or server.running else ():
            complete += 1
            prompt, answer = request.tokens.split(sizes[request.number])
            generator = torch.Generator().manual_seed(request.number)
            assert torch.equal(answer, alone.generate(prompt[None], len(answer), TEMPERATURE, generator)[0])
            state = f"{len(server.running)} running, {len(server.waiting)} waiting, {len(server.free)} free pages"
            print(f"step {step:3}: request {request.number:2} complete with {len(answer):3} tokens; {state}")
        step += 1
    print(f"all {requests} answers equal those of requests that are served alone")


if __name__ == "__main__":
    main()
