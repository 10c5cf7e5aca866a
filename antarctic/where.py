"""Where in an image CLIP's vector came from: each patch's direct share of it.

The class token's last state is a sum of what it began with, and of what each layer's attention and
MLP wrote into it; what attention wrote is in turn a sum over patches. The last layernorm (with the
deviation of the whole state) and the projection keep sums, so each patch has a share of the image's
vector, whose product with an entry's row is the patch's share of the entry's cosine. The idea is
that of Gandelsman et al. 2024, "Interpreting CLIP's Image Representation via Text-Based
Decomposition": https://arxiv.org/abs/2310.05916
"""

import math
from contextlib import ExitStack
from functools import partial

import torch
from torch.nn.functional import linear
from transformers import CLIPModel, SiglipModel

from antarctic.errors import InputError
from antarctic.preprocessing import OpenAIPreprocessor, center_box, resized_size


def require_maps(clip):
    """Raises InputError where contributions() or map_box() does not know the kind of a Clip."""
    model = clip.model
    if not isinstance(model, CLIPModel | SiglipModel):
        kind = {"clip": "a CLIP with a ResNet", "siglip2": "SigLIP 2 NaFlex"}.get(
            model.config.model_type, f"models of the kind {model.config.model_type}")
        raise InputError(f"--where knows CLIP with a vision transformer and SigLIP, not {kind}; "
                         f"leave it out, or give another --clip_model")
    if isinstance(model, SiglipModel) and not model.vision_model.use_head:
        raise InputError("--where needs the pooling head of a SigLIP, and this one has none; leave "
                         "it out, or give another --clip_model")
    map_box(clip, (64, 48))


# --------------------------------------------------------------------------------------- the shares

@torch.inference_mode()
def contributions(clip, images):
    """The unit vectors of B images, and the share that each patch has in them.

    clip: a Clip, see require_maps; nothing else uses it meanwhile. images: as of its encode_images.
    Returns (features, float32 (B, dim), those of encode_images; c, float32 (B, patches, dim), row
    by row from the top left), on the CPU. The sum of c over the patches, and what came from the
    class token itself, MLPs and biases, is the unit vector. SigLIP has no class token: its pooling
    head is taken in place of it, whose MLP is not linear, and is taken by its slope. One forward is
    computed, and memory holds the states of one layer beside it.
    """
    model, shares = clip.model, Shares()
    with ExitStack() as hooks:
        for module, hook in shares.hooks(model):
            hooks.enter_context(module.register_forward_hook(hook))
        features = clip.encode_images(images)
    return features, shares.of_vector.cpu()


class Shares:
    """Adds up the shares of patches while a model encodes images, by hooks that only read."""

    def __init__(self):
        self.states, self.written, self.of_vector = {}, 0, None

    def hooks(self, model):
        """Yields (module, hook) pairs."""
        vision = model.vision_model
        if isinstance(model, SiglipModel):
            yield vision.head, self.pool
            return
        for layer in vision.encoder.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                yield getattr(layer.self_attn, name), partial(self.keep, name)
            yield layer.self_attn, self.attend
        yield vision.post_layernorm, self.normalize
        yield model.visual_projection, self.project

    def keep(self, name, module, inputs, output):
        self.states[name] = output

    def attend(self, attention, inputs, output):
        """Adds what a layer's attention writes into the class token from each patch."""
        query, keys, values = (self.states.pop(name) for name in ("q_proj", "k_proj", "v_proj"))
        self.written += attended(query[:, :1], keys, values, attention.num_heads,
                                 attention.out_proj.weight)[:, 1:]

    def normalize(self, norm, inputs, output):
        """Takes the shares through the last layernorm, with the deviation of the whole state."""
        deviation = (inputs[0].float().var(-1, unbiased=False) + norm.eps).sqrt()  # (B,)
        centred = self.written - self.written.mean(-1, keepdim=True)
        self.written = centred / deviation[:, None, None] * norm.weight

    def project(self, projection, inputs, output):
        self.finish(linear(self.written, projection.weight.float()), output)

    def pool(self, head, inputs, output):
        """The shares of SigLIP's patches in what its pooling head makes of them."""
        [states], attention = inputs, head.attention
        query, keys, values = (linear(*each) for each in zip(
            (head.probe.expand(len(states), -1, -1), states, states),
            attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)))
        written = attended(query, keys, values, attention.num_heads, attention.out_proj.weight)
        state = written.sum(1, keepdim=True) + attention.out_proj.bias  # (B, 1, width)
        state, written = state.to(states.dtype), written.to(states.dtype)

        def slope(share):
            return torch.func.jvp(lambda state: head.mlp(head.layernorm(state)), (state,),
                                  (share[:, None],))[1][:, 0]

        self.finish(written + torch.func.vmap(slope, in_dims=1, out_dims=1)(written), output)

    def finish(self, shares, output):
        """Makes shares in the model's vectors, (B, patches, dim), those in the unit vectors."""
        self.of_vector = shares.float() / output.float().norm(dim=-1)[:, None, None]


def attended(query, keys, values, heads, out):
    """What attention brings to one query from each of N tokens, float32 (B, N, width), without the
    bias. query: (B, 1, width). keys, values: (B, N, width). out: the weight of the last layer."""
    query, keys, values = (states.unflatten(-1, (heads, -1)) for states in (query, keys, values))
    scores = torch.einsum("bqhd,bnhd->bnh", query, keys) * query.shape[-1] ** -0.5
    weights = scores.float().softmax(1)  # (B, N, heads)
    return linear((weights[..., None] * values).flatten(2), out.float()).float()


# ----------------------------------------------------------------------------------------- the maps

def maps(c, rows):
    """The share of each patch in the products of vectors with rows: float32 (B, k, side, side).

    c: of contributions(), (B, patches, dim). rows: (B, k, dim), such as the rows of tables'
    entries in the cache, of any length.
    """
    side = math.isqrt(c.shape[1])
    return (rows @ c.mT).unflatten(-1, (side, side))


def map_box(clip, size):
    """(left, top, right, bottom) of the part of an image that maps cover, as shares of its sides:
    what CLIP's resizing and central crop leave of it.

    size: (width, height) of the upright image. Raises InputError where the image processor is of
    a kind whose crop is not known.
    """
    processor, vision = clip.processor, clip.model.config.vision_config
    if isinstance(processor, OpenAIPreprocessor):
        resize, crop = {"shortest_edge": processor.size}, processor.crop_size
    else:
        config = processor.to_dict()
        resize = config["size"] if config["do_resize"] and not config.get("do_pad") else {}
        crop = config.get("do_center_crop") and [config["crop_size"][side]
                                                 for side in ("height", "width")]
    if resize.keys() == {"shortest_edge"}:
        resized = resized_size(size, resize["shortest_edge"])
    elif resize.keys() == {"height", "width"}:
        resized = resize["width"], resize["height"]
    else:
        raise InputError("--where cannot tell what the image processor of this CLIP model leaves "
                         "of an image; leave it out, or give another --clip_model")
    left, top, right, bottom = center_box(resized, crop) if crop else (0, 0, *resized)
    # Patches begin at the top left, and what is left at the other sides is in none.
    covered = vision.image_size // vision.patch_size * vision.patch_size / vision.image_size
    right, bottom = left + covered * (right - left), top + covered * (bottom - top)
    width, height = resized
    return left / width, top / height, right / width, bottom / height
