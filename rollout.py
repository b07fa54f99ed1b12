"""Generation with a KV cache, for answers that eval checks.

Shapes: B rows, S new tokens of a forward, C cache slots, H query heads, K key-value heads, E head width.
"""
import torch
import torch.nn.functional as F


@torch.no_grad()
def generate(decoder, prompts: list, *, max_new_tokens: int, stop: set[int], temperature: float = 0.0, seed: int = 0,
             batch: int = 256) -> list[list[int]]:
    """Continuations of prompts (lists of ids), without the stop token: greedy, or sampled at a temperature. The cache holds C =
    longest prompt + max_new_tokens slots; a key's slot is its position, so rows of different lengths need no padding on
    the left."""
    answers = []
    with torch.compiler.set_stance("force_eager"):  # its shapes are its own: they would use up the blocks' compilations
        for start in range(0, len(prompts), batch):
            generator = torch.Generator(decoder.lm_head.weight.device).manual_seed(seed + start)
            answers += _generate(decoder, prompts[start:start + batch], max_new_tokens, stop, temperature, generator)
    return answers


def _generate(decoder, prompts, max_new_tokens, stop, temperature, generator):
    shape, device = decoder.shape, decoder.lm_head.weight.device
    rows, longest = len(prompts), max(map(len, prompts))
    slots = longest + max_new_tokens
    if shape.gpt2:  # learned positions end
        slots = min(slots, shape.max_positions)
    keys = torch.zeros(shape.num_layers, 2, rows, shape.num_kv_heads, slots, shape.head_dim, device=device,
                       dtype=decoder.lm_head.weight.dtype)
    each = torch.arange(rows, device=device)[:, None]

    def forward(tokens, positions):  # (B, S) -> hidden (B, S, D)
        distance = positions[:, :, None] - torch.arange(slots, device=device)  # (B, S, C)

        def attend(layer, q, k, v):
            for which, new in enumerate((k, v)):
                keys[layer, which][each, :, positions] = new.unflatten(0, tokens.shape).to(keys.dtype)
            window = shape.windows[layer]
            mask = ((distance >= 0) & (distance < window if window else True))[:, None]
            q = q.unflatten(0, tokens.shape).transpose(1, 2)  # (B, H, S, E)
            k, v = keys[layer].to(q.dtype)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2).flatten(0, 1)

        return decoder.model(tokens.flatten(), positions.flatten(), attend).unflatten(0, tokens.shape)

    lengths = torch.tensor([len(p) for p in prompts], device=device)
    tokens = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)
    # Slots behind a short prompt hold padding until the row's own tokens overwrite them, each before it is first seen.
    hidden = forward(tokens, torch.arange(longest, device=device).expand(rows, -1))[each[:, 0], lengths - 1]
    stops = torch.tensor(sorted(stop), device=device)
    answers, done = [], torch.zeros(rows, dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        logits = decoder.lm_head(hidden)
        if temperature:
            chosen = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]
        else:
            chosen = logits.argmax(-1)
        done |= torch.isin(chosen, stops) | (lengths >= slots)
        answers.append(torch.where(done, -1, chosen))
        if done.all():
            break
        hidden = forward(chosen[:, None], lengths.clamp(max=slots - 1)[:, None])[:, 0]
        lengths = lengths + 1
    return [[t for t in row if t >= 0] for row in torch.stack(answers, 1).tolist()]
