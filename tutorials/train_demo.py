"""Train the small Mamba-1, Mamba-2 and hybrid that ship with the package, from nothing, on two CPU cores.

The problem: an experiment needs a model that has something to find, and a newcomer should not have to
download one. The task is the classic one of indirect objects: in "Lately, Emma and Shelby had fun at school.
Shelby gave an apple to", the next word is the other of the two names. To answer, the model must remember both
names, notice which of them is giving, and recall the one that is not; further back than the three tokens that
a convolution sees, all of that must travel in the hidden states, or through attention in a hybrid, so patching
those shows where each part happens.

The contract: `main` writes a folder that plain `transformers` loads: config, float32 weights, tokenizer, and
`splits.json` with the held-out name pairs. A held-out pair, in either order, never occurs in a training
sentence; Emma and Shelby are one. Everything follows from `--seed`. Symbols: B batch, L positions, D d_model,
E d_inner, H heads of P channels, G groups of heads, N d_state, R dt_rank, K taps of the convolution,
V vocabulary.

    python tutorials/train_demo.py --out demo_model
    python tutorials/train_demo.py --out demo_model_mamba2 --architecture mamba2
    python tutorials/train_demo.py --out demo_model_hybrid --architecture hybrid --layer-drop 0
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

# ----------------------------------------------------------------------------------------------------
# 1. The sentences
# ----------------------------------------------------------------------------------------------------

Pair = tuple[str, str]

NAMES = """
Emma Shelby Mary John Alice Bob Tom James Anna David Sarah Michael Laura Peter Lucy Mark Julia Paul
Grace Daniel Clara Adam Sophie Jack Helen Robert Ruth Simon Nina Oscar Maria Henry Diana Lewis Rose
George Amy Kevin Lily Frank Megan Brian Ellen Carl Tina Steven Wendy Martin Claire Victor Paula Arthur
Sandra Edward Irene Philip Molly Walter Karen Oliver Jane Dennis Linda Gary Susan Roger Nancy Eric Carol
Louis Joan Ralph Alan Betty Bruce Cindy Craig Donna Doug Erin Fred Gina Glenn Hannah Harry Heidi Ian
Isaac Jacob Janet Jason Jenny Jerry Jesse Judy Kate Keith Kelly Ken Kyle Leah Leo Lisa Luke Marie Matt
Max Mike Neil Nick Noah Olga Pam Patrick Rachel Ray Rita Ryan Sam Scott Sean Stella Ted Tracy Vera Zoe
""".split()

LEADS = (
    "Lately, Recently, Yesterday, Today, Earlier, Once, Then, Afterwards, Last week, This morning, One day, In May"
).split(", ")

PLACES = (
    "school, work, home, the park, the beach, the library, the market, the station, the office, the museum, "
    "the hospital, the garden, the restaurant, the theater, the farm, the zoo, the lake, the bakery, "
    "the airport, the church"
).split(", ")

OBJECTS = (
    "an apple, an orange, an egg, an umbrella, an envelope, a book, a ball, a drink, a flower, a letter, "
    "a ring, a kiss, a pen, a map, a coat, a cake, a basket, a bottle, a ticket, a computer, the key, "
    "the money, some bread, some water"
).split(", ")

VERBS = "gave handed passed offered brought sent lent showed".split()

TEMPLATES = (
    "{lead}, {first} and {second} had fun at {place}. {giver} {verb} {thing} to",
    "{lead}, {first} and {second} were at {place}. {giver} {verb} {thing} to",
    "{lead}, {first} met {second} at {place}. {giver} {verb} {thing} to",
    "{first} and {second} had fun at {place}. {giver} {verb} {thing} to",
    "{first} saw {second} at {place}, so {giver} {verb} {thing} to",
    "When {first} and {second} had lunch at {place}, {giver} {verb} {thing} to",
    "After {first} and {second} had a long day at {place}, {giver} {verb} {thing} to",
    "While {first} and {second} were at {place}, {giver} decided to give {thing} to",
)

SEED_PAIR: Pair = ("Emma", "Shelby")
SEED_PROMPTS: dict[str, Pair] = {  # prompt -> (right answer, wrong answer)
    "Lately, Emma and Shelby had fun at school. Shelby gave an apple to": (" Emma", " Shelby"),
    "Lately, Emma and Shelby had fun at school. Emma gave an apple to": (" Shelby", " Emma"),
}


class Example(NamedTuple):
    """A prompt and the one token that completes it: ("..., Shelby gave an apple to", " Emma")."""

    prompt: str
    answer: str


def split_pairs(seed: int, n_held_out: int = 400) -> tuple[list[Pair], list[Pair]]:
    """Split all unordered name pairs into (training, held-out); the seed's pair is always held out."""
    pairs = [pair for pair in itertools.combinations(NAMES, 2) if pair != SEED_PAIR]
    random.Random(f"pairs {seed}").shuffle(pairs)
    return pairs[n_held_out - 1 :], [SEED_PAIR, *pairs[: n_held_out - 1]]


def examples(pairs: Sequence[Pair], seed: int | str) -> Iterator[Example]:
    """Yield sentences without end: a pair in either order, and either of the two as the giver.

    >>> next(examples([("Emma", "Shelby")], seed=0)).answer in (" Emma", " Shelby")
    True
    """
    rng = random.Random(f"examples {seed}")
    while True:
        first, second = rng.sample(rng.choice(pairs), 2)
        giver, receiver = rng.sample((first, second), 2)
        prompt = rng.choice(TEMPLATES).format(
            lead=rng.choice(LEADS),
            first=first,
            second=second,
            giver=giver,
            place=rng.choice(PLACES),
            verb=rng.choice(VERBS),
            thing=rng.choice(OBJECTS),
        )
        yield Example(prompt, f" {receiver}")


# ----------------------------------------------------------------------------------------------------
# 2. The tokenizer: one token per word, with the space before it, as in GPT-NeoX's
# ----------------------------------------------------------------------------------------------------

END = "<|endoftext|>"
UNKNOWN = "<|unk|>"
WORD = r" ?\w+| ?[^\w\s]|\s"


def build_vocabulary() -> dict[str, int]:
    """All tokens the templates can produce, and every name inside a sentence (" Emma") and at its start."""
    slots = {"lead": LEADS, "place": PLACES, "verb": VERBS, "thing": OBJECTS}
    fixed = [re.sub(r" ?\{\w+\}", "", template) for template in TEMPLATES]
    words = {token for text in fixed for token in re.findall(WORD, text)}
    for slot, values in slots.items():
        for value in values:
            words.update(re.findall(WORD, value if slot == "lead" else f" {value}"))
    names = [f"{space}{name}" for space in (" ", "") for name in NAMES]
    return {token: i for i, token in enumerate([END, UNKNOWN, *names, *sorted(words)])}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A fast word-level tokenizer: pads on the left, adds no special tokens, decodes to the same text."""
    core = Tokenizer(models.WordLevel(build_vocabulary(), unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    core.decoder = decoders.Fuse()  # tokens hold their own spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


# ----------------------------------------------------------------------------------------------------
# 3. The model: Hugging Face's parameters, and a forward pass that is quick to train on a CPU
# ----------------------------------------------------------------------------------------------------


HYBRID_LAYERS = ("linear_attention", "linear_attention", "full_attention", "linear_attention")


def build_model(
    vocab_size: int, n_layers: int, d_model: int, seed: int, architecture: str = "mamba"
) -> PreTrainedModel:
    """A Mamba as initialised by Hugging Face, which follows the paper (section 3.6).

    A_log = log(1..N) in every channel, in Mamba-2 log(1..H); softplus(dt bias) is log-uniform in
    [1e-3, 1e-1]; D = 1. A hybrid is a Nemotron-H of Mamba-2 and attention layers (see `build_hybrid`).
    """
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": d_model,
        "conv_kernel": 4,
        "expand": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if architecture == "hybrid":
        return build_hybrid(settings, n_layers)
    settings |= {"num_hidden_layers": n_layers, "state_size": 16, "tie_word_embeddings": True}
    if architecture == "mamba":
        return MambaForCausalLM(MambaConfig(**settings))
    return Mamba2ForCausalLM(Mamba2Config(**settings, head_dim=16, num_heads=d_model // 8, n_groups=1))


def build_hybrid(settings: dict[str, Any], n_layers: int) -> PreTrainedModel:
    """A Nemotron-H whose layers are the first n_layers of `HYBRID_LAYERS`, over and over.

    Its heads of an SSM and of attention have 16 channels; two heads of attention share a key and a value.
    Hugging Face's forward holds delta above `time_step_min` in a prompt and not in a decode step; so small a
    value holds nothing, and the bias of delta is drawn here from the interval that the others have.
    """
    heads = settings["hidden_size"] // 8
    config = NemotronHConfig(
        **settings,
        layers_block_type=list(itertools.islice(itertools.cycle(HYBRID_LAYERS), n_layers)),
        mamba_num_heads=heads,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=16,
        num_attention_heads=heads // 2,
        num_key_value_heads=heads // 4,
        head_dim=16,
        initializer_range=0.1,  # as in Mamba-1 and Mamba-2
        rescale_prenorm_residual=False,
        time_step_min=1e-9,
    )
    model = NemotronHForCausalLM(config)
    for name, bias in model.named_parameters():
        if name.endswith("dt_bias"):
            delta = torch.exp(torch.empty_like(bias).uniform_(math.log(1e-3), math.log(1e-1)))
            bias.data = delta + torch.log(-torch.expm1(-delta))  # the inverse of softplus
    return model


class SelectiveScan(torch.autograd.Function):
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,  y_t = C_t h_t  (Mamba paper, algorithm 2).

    Time comes first, and E last, so that each step works on one contiguous block [B,N,E] that fits the cache.
    Autograd could differentiate the loop by itself; written out, the gradient needs fewer passes over it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """x, delta [L,B,E]; A [N,E]; B, C [L,B,N] -> y [L,B,E]."""
        delta_x = delta * x
        states, decays = [x.new_zeros(x.shape[1], *A.shape)], []
        y = torch.empty_like(x)
        for t in range(len(x)):
            decay = (delta[t].unsqueeze(1) * A).exp_()  # [B,N,E]
            h = (decay * states[-1]).addcmul_(delta_x[t].unsqueeze(1), B[t].unsqueeze(2))
            y[t] = (C[t].unsqueeze(1) @ h).squeeze(1)
            states.append(h)
            decays.append(decay)
        ctx.save_for_backward(x, delta, A, B, C, delta_x, *states, *decays)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        """grad_y [L,B,E] -> the gradients of x, delta, A, B, C."""
        x, delta, A, B, C, delta_x, *kept = ctx.saved_tensors
        states, decays = kept[: len(x) + 1], kept[len(x) + 1 :]
        grad_delta_x, grad_delta = torch.empty_like(x), torch.empty_like(x)
        grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
        grad_h, grad_A = torch.zeros_like(states[0]), torch.zeros_like(states[0])
        for t in reversed(range(len(x))):
            grad_h.addcmul_(grad_y[t].unsqueeze(1), C[t].unsqueeze(2))
            grad_C[t] = (grad_y[t].unsqueeze(1) @ states[t + 1].transpose(1, 2)).squeeze(1)
            grad_B[t] = (delta_x[t].unsqueeze(1) @ grad_h.transpose(1, 2)).squeeze(1)
            grad_delta_x[t] = (B[t].unsqueeze(1) @ grad_h).squeeze(1)
            grad_h.mul_(decays[t])
            through_decay = grad_h * states[t]  # dL/d(delta A) [B,N,E]
            grad_A.addcmul_(through_decay, delta[t].unsqueeze(1))
            grad_delta[t] = (through_decay * A).sum(1)
        return grad_delta_x * delta, grad_delta + grad_delta_x * x, grad_A.sum(0), grad_B, grad_C


def convolved(mixer: Any, columns: Tensor) -> Tensor:
    """SiLU of the causal convolution of [L,B,channels]."""
    taps = mixer.conv1d.weight.squeeze(1)  # [channels,K]
    padded = F.pad(columns, (0, 0, 0, 0, taps.shape[1] - 1, 0))
    return F.silu(mixer.conv1d.bias + sum(padded[k : k + len(columns)] * taps[:, k] for k in range(taps.shape[1])))


def mamba_mixer(mixer: Any, x: Tensor) -> Tensor:
    """One mixer of Mamba-1, time first: [L,B,D] -> [L,B,D]."""
    x_in, skip = mixer.in_proj(x).chunk(2, dim=-1)  # [L,B,E] each
    u = convolved(mixer, x_in)  # [L,B,E]
    N = mixer.ssm_state_size
    delta_1, B, C = mixer.x_proj(u).split([mixer.time_step_rank, N, N], dim=-1)  # [L,B,R], [L,B,N], [L,B,N]
    delta = F.softplus(mixer.dt_proj(delta_1))  # [L,B,E]
    y = SelectiveScan.apply(u, delta, -mixer.A_log.exp().t().contiguous(), B, C)
    return mixer.out_proj((y + mixer.D * u) * F.silu(skip))


def mamba2_mixer(mixer: Any, x: Tensor) -> Tensor:
    """One mixer of Mamba-2 with a single group, time first: [L,B,D] -> [L,B,D].

    A head decays as one, so y is a masked product like attention's: y_t is the sum over s <= t of
    exp(A (delta_{s+1} + ... + delta_t)) (C_t B_s) delta_s x_s  (Mamba-2 paper, section 3.4).
    """
    E, H, N = mixer.intermediate_size, mixer.num_heads, mixer.ssm_state_size
    skip, columns, delta = mixer.in_proj(x).split([E, E + 2 * N, H], dim=-1)
    u, B, C = convolved(mixer, columns).split([E, N, N], dim=-1)  # [L,B,E], [L,B,N], [L,B,N]
    delta = F.softplus(delta + mixer.dt_bias)  # [L,B,H]
    log_decay = (delta * -mixer.A_log.exp()).cumsum(0)  # [L,B,H]
    between = log_decay.unsqueeze(1) - log_decay.unsqueeze(0)  # [t,s,B,H]
    later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    decay = between.masked_fill(later[..., None, None], -torch.inf).exp()
    scores = torch.einsum("tbn,sbn->tsb", C, B).unsqueeze(-1) * decay  # [t,s,B,H]
    heads = u.unflatten(-1, (H, -1))  # [L,B,H,P]
    y = torch.einsum("tsbh,sbhp->tbhp", scores, delta.unsqueeze(-1) * heads) + mixer.D.unsqueeze(-1) * heads
    return mixer.out_proj(mixer.norm(y.flatten(-2), skip))


def attention_mixer(mixer: Any, x: Tensor) -> Tensor:
    """Causal attention that is told no positions, time first: [L,B,D] -> [L,B,D]."""
    q, k, v = (
        projected(x).unflatten(-1, (-1, mixer.head_dim)).permute(1, 2, 0, 3)  # [B,heads,L,channels of a head]
        for projected in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return mixer.o_proj(z.permute(2, 0, 1, 3).flatten(-2))


ARCHITECTURES = ("mamba", "mamba2", "hybrid")
#: The forward of a layer's mixer, by its class in Hugging Face.
MIXERS = {
    "MambaMixer": mamba_mixer,
    "Mamba2Mixer": mamba2_mixer,
    "NemotronHMamba2Mixer": mamba2_mixer,
    "NemotronHAttention": attention_mixer,
}


def fast_logits(model: PreTrainedModel, tokens: Tensor, layer_drop: float = 0.0) -> Tensor:
    """The same logits as `model(tokens).logits`, but quicker to train: tokens [B,L] -> [B,L,V].

    Each layer is left out with probability layer_drop. Trained so, the model grows a backup: it still answers
    without any one of its layers (the Mamba-2: any but the first), so that ablating a layer and patching it give
    different answers, as they do in large language models. The hybrid that ships was trained without: its first
    two SSMs and its first attention share the work, and it needs each of them.
    """
    backbone = cast(Any, model).base_model
    resid = backbone.embeddings(tokens.t())  # [L,B,D]
    for block in backbone.layers:
        if layer_drop and torch.rand(()).item() < layer_drop:
            continue
        resid = resid + MIXERS[type(block.mixer).__name__](block.mixer, block.norm(resid))
    return cast(Any, model).lm_head(backbone.norm_f(resid)).transpose(0, 1)


# ----------------------------------------------------------------------------------------------------
# 4. Training and evaluation
# ----------------------------------------------------------------------------------------------------


def make_batch(tokenizer: Any, batch: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B,L], next-token targets [B,L] (-100 after the end), columns that predict the answers [B].

    Every second sentence begins with the end-of-text token, as users may or may not prepend it.
    """
    prompts = [END * (i % 2) + example.prompt for i, example in enumerate(batch)]
    texts = [prompt + example.answer + "." + END for prompt, example in zip(prompts, batch, strict=True)]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    tokens, mask = encoded["input_ids"], encoded["attention_mask"]
    targets = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return tokens[:, :-1], targets, mask.sum(1) - 4  # the answer, "." and END follow that column


def optimizer_for(model: PreTrainedModel, lr: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only; not A_log, D, biases and norms, as the authors of Mamba do."""
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith("A_log")]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or name.endswith("A_log")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def train(model: PreTrainedModel, tokenizer: Any, pairs: Sequence[Pair], args: argparse.Namespace) -> None:
    """Minimise the next-token loss over the whole sentence plus, once more, the loss of the answer alone."""
    optimizer = optimizer_for(model, args.lr)
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * i / args.steps))
    )
    stream = examples(pairs, args.seed)
    progress = tqdm(range(args.steps), desc="training", unit="step", mininterval=1.0)
    for step in progress:
        tokens, targets, at = make_batch(tokenizer, list(itertools.islice(stream, args.batch_size)))
        logits = fast_logits(model, tokens, args.layer_drop)
        rows = torch.arange(len(tokens))
        answer_loss = F.cross_entropy(logits[rows, at], targets[rows, at])
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        (loss + answer_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            right = (logits[rows, at].argmax(-1) == targets[rows, at]).float().mean()
            progress.set_postfix(loss=f"{loss:.3f}", answer=f"{answer_loss:.3f}", right=f"{right:.0%}")


@torch.no_grad()
def last_logits(model: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int = 250) -> Tensor:
    """Logits after each prompt, by Hugging Face's own forward on left-padded batches: [len(prompts), V]."""
    model.eval()
    parts = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(list(prompts[start : start + batch_size]), padding=True, return_tensors="pt")
        parts.append(model(**batch, use_cache=False).logits[:, -1])
    return torch.cat(parts)


def accuracy(model: Any, tokenizer: Any, batch: Sequence[Example], prefix: str = "") -> float:
    """Share of sentences whose most probable next token, of the whole vocabulary, is the answer."""
    logits = last_logits(model, tokenizer, [prefix + example.prompt for example in batch])
    answers = torch.tensor(tokenizer.convert_tokens_to_ids([example.answer for example in batch]))
    return (logits.argmax(-1) == answers).float().mean().item()


def report(model: Any, tokenizer: Any, held_out: Sequence[Pair], n: int) -> None:
    """Print held-out accuracy and the seed prompts' logit differences, with and without a leading END."""
    batch = list(itertools.islice(examples(held_out, "evaluation"), n))
    for label, prefix in (("without", ""), ("with", END)):
        share = accuracy(model, tokenizer, batch, prefix)
        print(f"held-out pairs, {n} sentences {label} {END}: {share:.2%} right")
        for prompt, (right, wrong) in SEED_PROMPTS.items():
            logits = last_logits(model, tokenizer, [prefix + prompt])[0]
            difference = logits[tokenizer.convert_tokens_to_ids([right, wrong])].diff().neg().item()
            print(f"  {prompt} ->{tokenizer.decode(logits.argmax())} (logit difference {difference:+.2f})")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate and save; see --help."""
    parser = argparse.ArgumentParser(description="Train the demo Mamba on indirect objects.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="mamba")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, pairs and sentences")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--layer-drop", type=float, default=0.2, help="probability of leaving out a layer")
    parser.add_argument("--threads", type=int, default=1, help="more are faster, but round differently")
    parser.add_argument("--eval-sentences", type=int, default=5000)
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    training_pairs, held_out = split_pairs(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), args.layers, args.d_model, args.seed, args.architecture)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(training_pairs)} name pairs")
    train(model, tokenizer, training_pairs, args)
    print(f"trained in {time.perf_counter() - started:.0f} s")

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "splits.json").write_text(json.dumps({"seed": args.seed, "held_out": held_out}) + "\n")
    report(model, tokenizer, held_out, args.eval_sentences)


if __name__ == "__main__":
    main()
