"""Linear layers whose weights are laid out once, for captioning on a CPU: float32, or int8.

torch's own products lay float32 weights out anew in each call, which costs as much as the product
itself where there are few rows. Products of int8 read a quarter of the bytes.
"""

import torch
from torch.nn import Linear, Module

FUNCTIONS = {  # of oneDNN in torch.ops, which are not public
    torch.float32: ("mkldnn", ("_reorder_linear_weight", "_linear_pointwise")),
    torch.int8: ("onednn", ("qlinear_prepack", "qlinear_pointwise"))}
# Inputs have 7 bits: processors without VNNI add two products in 16 bits, where 8 would overflow.
MOST, ZERO = 63, 64


class PackedLinear(Module):
    """A Linear in float32. To a product's bits, it computes the same."""

    def __init__(self, linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, states):
        return torch.ops.mkldnn._linear_pointwise(states, self.weight, self.bias, "none", [], "")


class Int8Linear(Module):
    """A Linear in int8: weights have a scale for each output, inputs one for each row, so that what
    is computed of a row does not depend on the others."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()  # (outputs, inputs)
        self.scales = weight.abs().amax(1).clamp(min=1e-30) / 127  # (outputs,)
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        weight = (weight / self.scales[:, None]).round_().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(weight, None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, states):
        rows = states.flatten(0, -2)  # (R, inputs)
        scales = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / MOST  # (R, 1)
        rows = (rows / scales).round_().add_(ZERO).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, ZERO, self.weight, self.scales, self.zeros, None, 1.0, 0, torch.float32,
            "none", [], "")  # (R, outputs)
        product *= scales
        if self.bias is not None:
            product += self.bias
        return product.unflatten(0, states.shape[:-1])


def can_pack(dtype):
    """Whether this build of torch has the functions. dtype: torch.float32 or torch.int8."""
    namespace, names = FUNCTIONS[dtype]
    functions = getattr(torch.ops, namespace)
    return torch.backends.mkldnn.is_available() and all(hasattr(functions, n) for n in names)


def is_packed(model):
    return any(isinstance(part, PackedLinear | Int8Linear) for part in model.modules())


@torch.no_grad()
def pack(model, dtype):
    """Replaces the linear layers of a model on a CPU, with float32 weights, by packed ones; their
    own weights are gone then, so it can only compute. dtype: torch.float32 or torch.int8."""
    kind = Int8Linear if dtype == torch.int8 else PackedLinear
    for part in list(model.modules()):
        for name, layer in part.named_children():
            if type(layer) is Linear:
                setattr(part, name, kind(layer))
