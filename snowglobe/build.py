"""Trains the snowglobe's small models from scratch and saves them as save_pretrained does.

    python -m snowglobe.build clip bart gpt --out /tmp/weights --minutes 60
    python -m snowglobe.build clip --out /tmp/weights --minutes 60 --resume

The models in snowglobe/weights were trained on a CPU with bfloat16 units (AMX), in float32 with
bfloat16 autocast. Each had several runs, which continued from the run before (--resume) with a
schedule over their own time, so another machine gets other weights:
- CLIP, 4.0M parameters: 43 and 33 minutes (1,500 and 1,870 steps of 256 images) on emptier scenes,
  at first without the loss "things"; then 500 steps on the present scenes (--seed 2), and 55
  minutes on two cores (--seed 3, 2,950 steps).
- BART, 3.4M: 50 minutes on one core (6,500 steps of 128 texts) without page_text; then with it
  2,000 steps (--seed 2) and 11 minutes (--seed 4, 880 steps).
- GPT-Neo, 0.4M: 7 minutes on one core (1,730 steps of 64 stories).

Quality of each model alone, as `python -m snowglobe.measure --alone` prints it after the demo:
    CLIP: of 500 captions of val2017 an image's own comes first for 90%
    CLIP: in tables of 8 entries stand 92% of the kinds; 94% of the kinds in them are there
    CLIP: in tables of 16 entries stand 96% of the kinds; 73% of the kinds in them are there
    CLIP: in tables of 24 entries stand 98% of the kinds; 46% of the kinds in them are there
    CLIP: in tables of 32 entries stand 99% of the kinds; 30% of the kinds in them are there
    BART: denoises 500 fresh captions at 0.52 nats a token
    GPT-Neo: perplexity 2.09 on 200 fresh stories
`./demo.sh --full` measures the whole table of docs/results.md, with perfect and random tables as
bounds.
"""

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import pre_tokenizers, trainers
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    GPT2Tokenizer,
    GPTNeoConfig,
    GPTNeoForCausalLM,
)

from snowglobe import scenes
from utils import linearize

GROUPS = {  # for fact_text: {class: its kinds}
    "an animal": ("dog", "cat", "horse", "cow", "pig", "sheep", "elephant", "giraffe", "rabbit",
                  "bird", "duck", "fish", "butterfly", "turtle", "penguin", "whale"),
    "a vehicle": ("car", "bus", "truck", "bicycle", "boat", "airplane", "rocket", "train"),
    "a building": ("house", "castle", "windmill", "lighthouse"),
    "food": ("pizza", "apple", "banana", "cake", "ice cream", "mushroom"),
    "a toy": ("ball", "kite", "robot", "guitar", "snowman"),
    "a plant": ("tree", "flower", "cactus"),
}
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
PIXELS = 96  # each side of CLIP's images


# -------------------------------------------------------------------------------------------- texts

def any_scene(rng, must=(), most_groups=3):
    """A scene of all kinds, the held-out ones included: a pretrained model has seen them. It is the
    one with more kinds of two scenes, since such scenes are harder. must, most_groups: see
    scenes.make_scene."""
    options = [scenes.make_scene(rng, list(scenes.KINDS), must, most_groups) for _ in range(2)]
    return max(options, key=lambda scene: len(scene.groups))


def coined_word(rng):
    """A new word. It teaches the model to copy words from its input."""
    syllables = [rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))]
    return "".join(syllables) + rng.choice(("", "n", "x", "l"))


def caption_text(rng):
    """A caption, in which a coined word sometimes replaces a noun."""
    scene = any_scene(rng)
    text = scenes.caption(scene, rng)
    if rng.random() < 0.08:
        name, coined = scenes.KINDS[rng.choice(scene.groups)[0]].nouns[0][0], coined_word(rng)
        text = " ".join(coined if word == name else word for word in text.split())
    return text


def fact_text(rng):
    name = rng.choice(list(scenes.KINDS))
    noun, plural = rng.choice(scenes.KINDS[name].nouns)
    group = next((group for group, members in GROUPS.items() if name in members), "a thing")
    place = rng.choice(scenes.SETTINGS[rng.choice(list(scenes.SETTINGS))])
    colour = rng.choice(list(scenes.COLOURS))
    number = rng.choice(("two", "three", "four"))
    return rng.choice((
        f"the {noun} is {group}.",
        f"is the {noun} {group}? yes, it is.",
        f"where is the {noun}? it is {place}.",
        f"what colour is the {noun}? it is {colour}.",
        f"how many {plural} are there? there are {number} {plural}.",
        f"i saw {number} {plural} {place}.",
        f"{plural} are not always {colour}.",
        f"my {noun} is {colour}.",
        f"the {colour} {noun} was {place} and the {number} {plural} were not.",
    ))


def story_text(rng):
    """A short story from templates that continues a caption."""
    starts = ("a ", "an ", "one ", "two ", "three ", "four ")
    text = scenes.caption(any_scene(rng), rng)
    while not text.startswith(starts) or " is " in text or " are " in text:
        text = scenes.caption(any_scene(rng), rng)
    many = text.startswith(("two ", "three ", "four ", "a pair", "a group"))
    they, was, them = ("they", "were", "them") if many else ("it", "was", "it")
    group = rng.choice(list(scenes.KINDS)), rng.choice(list(scenes.COLOURS)), 1
    friend = scenes.noun_phrase(rng, group)
    noun = friend.split()[-1]
    place = rng.choice(scenes.SETTINGS[rng.choice(list(scenes.SETTINGS))])
    feeling, other = rng.sample(("happy", "sad", "tired", "hungry", "brave", "lonely", "proud"), 2)
    middle = rng.choice((
        f"One day {they} met {friend} {place}. The {noun} said hello and {they} became friends.",
        f"Every morning {they} dreamed of {friend}. One day the dream came true {place}.",
        f"A storm came and {they} had to hide {place}. There {they} found {friend}.",
        f"Nobody knew why, until {friend} came along {place} and asked.",
    ))
    end = rng.choice((
        f"From that day on {they} {was} never {feeling} again.",
        f"In the end {they} {was} very {other} and went home.",
        "And they all lived happily ever after.",
        f"That night the {noun} stayed with {them}, and {they} {was} {other}.",
    ))
    return (f"Once upon a time there was {text}. {they.capitalize()} {was} very {feeling}. "
            f"{middle} {end}")


def fragment(rng, text, most=3):
    """1 to `most` consecutive words of a text."""
    words = text.replace(",", "").split()
    n = min(len(words), rng.randint(1, most))
    start = rng.randrange(len(words) - n + 1)
    return " ".join(words[start:start + n])


def list_text(rng):
    """A list of unrelated fragments with bars between. It teaches BART to copy a list as a list."""
    return linearize(fragment(rng, caption_text(rng)) for _ in range(rng.randint(2, 8))).strip()


def page_text(rng):
    """A caption, then keywords of the same scene, as on web pages."""
    scene = any_scene(rng)
    keywords = dict.fromkeys(
        fragment(rng, scenes.caption(scene, rng), 2) for _ in range(rng.randint(4, 10)))
    return f"{scenes.caption(scene, rng)}. {', '.join(keywords)}"


def story_sentence(rng):
    return rng.choice(story_text(rng).split(". "))


def bart_text(rng):
    make = rng.choices((caption_text, page_text, story_sentence, fact_text, list_text),
                       (46, 26, 8, 10, 10))[0]
    return make(rng).lower()


def noised(rng, text):
    """A text with the noise of BART's denoising task (Lewis et al. 2019,
    https://arxiv.org/abs/1910.13461): one mask replaces a sentence of several, or a span of
    Poisson(3) words; spans are permuted, words are deleted. Lists keep their words in order."""
    sentences = text.split(". ")
    if len(sentences) > 1 and rng.random() < 0.7:
        sentences[rng.randrange(len(sentences))] = "<mask>"
    words = " ".join(sentences).split()
    is_list = "|" in words
    if not is_list and rng.random() < 0.7:
        spans, i = [], 0
        while i < len(words):
            n = rng.randint(1, 4)
            spans.append(words[i:i + n])
            i += n
        rng.shuffle(spans)
        words = sum(spans, [])
    if not is_list and rng.random() < 0.6:
        rate = rng.uniform(0, 0.6)
        words = [w for w in words if rng.random() >= rate] or words[:1]
    if rng.random() < 0.5:
        rate, out, i = rng.uniform(0.1, 0.5) / 3, [], 0
        while i < len(words):
            if rng.random() < rate:
                out.append("<mask>")
                i += poisson3(rng)
            out += words[i:i + 1]
            i += 1
        words = out
    return " ".join(words)


def poisson3(rng):
    n, p, floor = 0, rng.random(), math.exp(-3)
    while p > floor:
        n, p = n + 1, p * rng.random()
    return n


def train_tokenizer(tokenizer, texts, specials, vocab_size, **options):
    """Trains a byte-level BPE with the other steps of a tokenizer. Returns (vocabulary, merges)."""
    backend = tokenizer.backend_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False, **options)
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(m) for m in model["merges"]]


def fit(name, parameters, losses, minutes, peak, keep):
    """Trains with AdamW for some minutes: the rate rises linearly over 400 steps and falls as a
    cosine to 2% of its peak.

    losses(): {name: loss} of a new batch; their sum is minimized. keep(): saves the model, every
    500 steps and at the end.
    """
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.02, betas=(0.9, 0.98), fused=True)
    start, step, average = time.time(), 0, {}
    while (share := (time.time() - start) / 60 / minutes) < 1:
        batch = losses()
        sum(batch.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (step + 1) / 400) * cosine
        optimizer.step()
        optimizer.zero_grad()
        for key, loss in batch.items():
            average[key] = 0.98 * average.get(key, loss.item()) + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            print(f"{name} step {step}, {share:.0%}:",
                  *(f"{key} {value:.3f}" for key, value in average.items()), flush=True)
        if step % 500 == 0:
            keep()
    keep()


def resumed(model_class, tokenizer_class, folder):
    """The saved model, in float32, and its tokenizer."""
    model = model_class.from_pretrained(folder, dtype=torch.float32)
    return model, tokenizer_class.from_pretrained(folder)


def save(folder, model, *others):
    """Saves a model in half precision, with its tokenizer and processor. The weights in training
    stay float32."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(folder)
    for other in others:
        other.save_pretrained(folder)


# --------------------------------------------------------------------------------------------- BART

def build_bart(out, minutes, seed, resume):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    if resume:
        model, tokenizer = resumed(BartForConditionalGeneration, BartTokenizer, out / "bart")
    else:
        texts = (bart_text(rng) for _ in range(40000))
        specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        vocab, merges = train_tokenizer(BartTokenizer(add_prefix_space=True), texts, specials, 1100)
        tokenizer = BartTokenizer(vocab=vocab, merges=merges, add_prefix_space=True,
                                  model_max_length=160)
        model = BartForConditionalGeneration(BartConfig(
            vocab_size=len(tokenizer), d_model=192, encoder_layers=3, decoder_layers=3,
            encoder_ffn_dim=768, decoder_ffn_dim=768, encoder_attention_heads=4,
            decoder_attention_heads=4, dropout=0.0, max_position_embeddings=160, bos_token_id=0,
            pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2))
    model.set_attn_implementation("eager")

    def losses():
        texts = [bart_text(rng) for _ in range(128)]
        inputs = tokenizer([noised(rng, t) for t in texts], padding=True, truncation=True,
                           max_length=128, return_tensors="pt")
        labels = tokenizer(texts, padding=True, truncation=True, max_length=64,
                           return_tensors="pt").input_ids
        labels[labels == tokenizer.pad_token_id] = -100
        with torch.autocast("cpu", torch.bfloat16):
            return {"loss": model(**inputs, labels=labels).loss}

    fit("bart", list(model.parameters()), losses, minutes, 1.2e-3,
        lambda: save(out / "bart", model, tokenizer))


# ---------------------------------------------------------------------------------------------- GPT

def build_gpt(out, minutes, seed, resume):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    end = "<|endoftext|>"
    if resume:
        model, tokenizer = resumed(GPTNeoForCausalLM, GPT2Tokenizer, out / "gpt")
    else:
        texts = (story_text(rng) for _ in range(20000))
        vocab, merges = train_tokenizer(GPT2Tokenizer(), texts, [end], 800)
        tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges, model_max_length=128, pad_token=end)
        model = GPTNeoForCausalLM(GPTNeoConfig(
            vocab_size=len(tokenizer), hidden_size=96, num_layers=3, num_heads=4,
            attention_types=[[["global"], 3]], max_position_embeddings=128, bos_token_id=0,
            eos_token_id=0))

    def losses():
        tokens = tokenizer([story_text(rng) + end for _ in range(64)], padding=True,
                           truncation=True, max_length=128, return_tensors="pt")
        labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
        with torch.autocast("cpu", torch.bfloat16):
            return {"loss": model(**tokens, labels=labels).loss}

    fit("gpt", list(model.parameters()), losses, minutes, 2e-3,
        lambda: save(out / "gpt", model, tokenizer))


# --------------------------------------------------------------------------------------------- CLIP

def altered(rng, scene):
    """The scene with a kind, colour, count or the setting changed, for captions that are almost
    right."""
    groups, i = list(scene.groups), rng.randrange(len(scene.groups))
    name, colour, n = groups[i]
    u = rng.random()
    if u < 0.4:
        name = rng.choice(list(scenes.KINDS))
        if not scenes.KINDS[name].coloured:
            colour = ""
        elif not colour:
            colour = rng.choice(list(scenes.COLOURS))
    elif u < 0.65 and colour:
        colour = rng.choice(list(scenes.COLOURS))
    elif u < 0.85:
        n = rng.choice((1, 2, 3, 4))
    else:
        return scene._replace(setting=rng.choice(list(scenes.SETTINGS)))
    groups[i] = name, colour, n
    size = scene.size if len(groups) == 1 and n == 1 else ""
    return scene._replace(groups=tuple(groups), size=size)


def render(seed):
    """The scene of a seed and its image for CLIP: (scene, uint8 (PIXELS, PIXELS, 3))."""
    rng = random.Random(seed)
    must = scenes.HELD_OUT if rng.random() < 0.15 else ()
    scene = any_scene(rng, must, rng.choice((1, 3, 3, 3, 3, 3)))
    picture = scenes.draw_scene(scene).resize((PIXELS, PIXELS), scenes.Image.BICUBIC)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return scene, pixels.view(PIXELS, PIXELS, 3)


class Claims:
    """Tells which texts are true of which scenes, by a matrix product over features. most: the
    largest number of features."""

    def __init__(self, most=4000):
        self.index, self.most = {}, most

    def matrix(self, sets):
        """Sets of features as rows of 0 and 1, float32 (len(sets), most)."""
        matrix = torch.zeros(len(sets), self.most)
        for row, features in zip(matrix, sets):
            row[[self.index.setdefault(feature, len(self.index)) for feature in features]] = 1
        return matrix

    def true(self, texts, facts):
        """Whether all claims of a text are facts of a scene, bool (texts, scenes)."""
        return self.matrix(texts) @ (1 - self.matrix(facts)).T == 0


def augmented(pixels, mean, std):
    """Images as CLIP's processor returns them, float32 (B, 3, H, W), but shifted by up to 4 pixels
    and half of them mirrored. pixels: uint8 (B, H, W, 3)."""
    images = pixels.permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
    mirrored = torch.rand(len(images)) < 0.5
    images[mirrored] = images[mirrored].flip(-1)
    dx, dy = torch.randint(0, 9, (2,)).tolist()
    images = functional.pad(images, (4, 4, 4, 4), mode="replicate")
    return (images[:, :, dy:dy + PIXELS, dx:dx + PIXELS] - mean) / std


def sentence_loss(logits, also_true):
    """InfoNCE from images to sentences and back, a scalar.

    logits: (B, S), S >= B. Sentence i describes image i; sentences from B on are almost right.
    also_true: bool (B, S), pairs that are true by chance; they do not count as negatives.
    """
    target = torch.arange(len(logits))
    logits = logits.masked_fill(also_true & ~torch.eye(*logits.shape, dtype=torch.bool), -1e4)
    to_sentences = functional.cross_entropy(logits, target)
    to_images = functional.cross_entropy(logits[:, :len(target)].T, target)
    return (to_sentences + to_images) / 2


def excess(log_p, aim):
    """Cross-entropy to a target distribution minus the target's entropy, by element."""
    return aim * (aim.clamp(min=1e-9).log() - log_p)


def fragment_losses(logits, truth, plain, names_kind):
    """Three losses between images and fragments of captions: (to images, to fragments, things).

    logits: (B, P). truth: float32 (B, P), 1 where a fragment is true of an image. plain: bool (P,),
    whether a fragment has no function words. names_kind: bool (P,), whether it names a kind.

    The target of a fragment is all images that it is true of, and the reverse. In the loss to
    fragments, a fragment has more weight the fewer images it is true of. So the cosine grows with
    the information of an entry, as pointwise mutual information does: "red dog" ranks before "dog"
    before "beach", and function words rank last. The loss "things" ranks plain fragments that name
    a kind of the image above all false ones; without it small objects would have no entry among the
    nearest.
    """
    aim_t = truth / truth.sum(0).clamp(min=1)
    aim_i = aim_t * torch.where(plain, 1.0, 0.25)
    aim_i = aim_i / aim_i.sum(1, keepdim=True).clamp(min=1e-9)
    to_images = excess(logits.log_softmax(0), aim_t).sum(0)[truth.sum(0) > 0].mean()
    to_fragments = excess(logits.log_softmax(1), aim_i).sum(1).mean()
    naming = truth * (names_kind & plain)
    false = logits.masked_fill(truth > 0, -1e4).logsumexp(1, keepdim=True)
    ranking = (functional.softplus(false - logits) * naming).sum(1)  # (B,)
    things = (ranking / naming.sum(1).clamp(min=1)).mean()
    return to_images, to_fragments, things


def build_clip(out, minutes, seed, resume, n_images=160000, batch=256):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    world, pixels = [None] * n_images, torch.empty(n_images, PIXELS, PIXELS, 3, dtype=torch.uint8)
    for i in tqdm(range(n_images), "drawing"):
        world[i], pixels[i] = render(f"{seed}/clip/{i}")
    if resume:
        model, tokenizer = resumed(CLIPModel, CLIPTokenizer, out / "clip")
    else:
        letters = list("abcdefghijklmnopqrstuvwxyz0123456789") * 20
        texts = [caption_text(rng) for _ in range(40000)] + letters
        texts += [coined_word(rng) for _ in range(300)]
        specials = ["<|startoftext|>", "<|endoftext|>"]
        vocab, merges = train_tokenizer(CLIPTokenizer(), texts, specials, 1100,
                                        end_of_word_suffix="</w>")
        tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
        text_config = dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=77, hidden_act="gelu",
            projection_dim=128, bos_token_id=0, eos_token_id=1, pad_token_id=1)
        vision_config = dict(
            hidden_size=224, intermediate_size=896, num_hidden_layers=5, num_attention_heads=4,
            image_size=PIXELS, patch_size=16, hidden_act="gelu", projection_dim=128)
        model = CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision_config,
                                     projection_dim=128))
    # On a CPU in bfloat16, a step takes 0.4 of the time of fused attention.
    model.set_attn_implementation("eager")
    processor = CLIPImageProcessorPil(size={"shortest_edge": PIXELS},
                                      crop_size={"height": PIXELS, "width": PIXELS})
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    words = {word for _ in range(20000) for word in caption_text(rng).replace(",", "").split()
             if scenes.claims(word)}
    unigrams = sorted(words - scenes.FUNCTION_WORDS)
    scale = torch.nn.Parameter(torch.tensor(2.5))  # of the fragments' logits, in training only
    judge = Claims()

    def embed(texts):
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            features = model.get_text_features(**tokens).pooler_output
        return functional.normalize(features.float(), dim=-1)

    def losses():
        rows = [rng.randrange(n_images) for _ in range(batch)]
        facts = [scenes.truths(world[i]) for i in rows]
        sentences = [scenes.caption(world[i], rng) for i in rows]
        sentences += [scenes.caption(altered(rng, world[i]), rng) for i in rows]
        pieces = [fragment(rng, rng.choice(sentences)) for _ in range(300)]
        pieces = list(dict.fromkeys(pieces + rng.sample(unigrams, 150)))
        claims = [scenes.claims(piece) for piece in pieces]
        truth = judge.true(claims, facts).T.float()  # (B, P)
        truth[:, [not claimed for claimed in claims]] = 0  # "and a" should score low everywhere
        plain = torch.tensor([not scenes.FUNCTION_WORDS & set(piece.split()) for piece in pieces])
        names_kind = torch.tensor([any(claim[0] == "kind" for claim in claimed)
                                   for claimed in claims])
        batch_pixels = augmented(pixels[rows], mean, std)  # (B, 3, PIXELS, PIXELS)
        with torch.autocast("cpu", torch.bfloat16):
            images = model.get_image_features(pixel_values=batch_pixels).pooler_output
        images = functional.normalize(images.float(), dim=-1)  # (B, 128)
        logits = scale.exp().clamp(max=40) * images @ embed(pieces).T  # (B, P)
        to_images, to_fragments, things = fragment_losses(logits, truth, plain, names_kind)
        logits = model.logit_scale.exp().clamp(max=60) * images @ embed(sentences).T  # (B, 2B)
        also_true = judge.true([scenes.claims(sentence) for sentence in sentences], facts).T
        return {"sentences": sentence_loss(logits, also_true), "to fragments": to_fragments,
                "to images": to_images, "things": 2 * things}

    fit("clip", [*model.parameters(), scale], losses, minutes, 1e-3,
        lambda: save(out / "clip", model, tokenizer, processor))


BUILDERS = {"clip": build_clip, "bart": build_bart, "gpt": build_gpt}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=BUILDERS, help="which models to train")
    parser.add_argument("--out", type=Path, default=Path("snowglobe/weights"),
                        help="folder for clip/, bart/, gpt/ (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=60,
                        help="minutes of training for each model (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed of the texts, scenes and weights (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(),
                        help="CPU threads (default %(default)s: all)")
    parser.add_argument("--resume", action="store_true",
                        help="start from the weights in --out, with a new schedule")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.models:
        BUILDERS[name](args.out, args.minutes, args.seed, args.resume)


if __name__ == "__main__":
    main()
