"""A decoupled network for serving: batch normalisations folded into the convolutions and linear maps before them.

At test time a batch normalisation is a fixed scale and offset, so folding changes nothing but the rounding of float32.
A batch of one image costs as much in calls as in arithmetic, and this halves the calls.
"""

import copy
from collections import Counter

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_eval

from detector.network.decouple import GatedNet


def fold_normalisation(network: GatedNet, share: bool = False) -> GatedNet:
    """A copy of `network`, which must be in evaluation mode, with every normalisation folded that can be.

    The copy is for inference only: it cannot be trained further. In a network that torch.fx cannot trace only the
    gates' own normalisations are folded.

    Args:
        network: the decoupled network.
        share: leave weights that are not changed where they are, in the memory of both: to be read only.
    """
    # A copy of a module has the tensors that its memo says it has copied already.
    kept = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())} if share else {}
    folded: GatedNet = copy.deepcopy(network, kept)
    graph = folded.graph
    for gate in folded.gates():
        if isinstance(gate.normalise, nn.BatchNorm1d):
            gate.excite = fuse_linear_bn_eval(gate.excite, gate.normalise)
            gate.normalise = nn.Identity()
    if isinstance(graph, fx.GraphModule):
        fold_graph(graph)
    return folded.eval()


def fold_graph(graph: fx.GraphModule) -> None:
    """Fold, in place, every normalisation of a traced network that can be; it must be in evaluation mode."""
    modules = dict(graph.named_modules())
    calls = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_module")
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not isinstance(modules.get(str(node.target)), nn.BatchNorm2d):
            continue
        before = node.args[0]
        convolution = modules.get(str(before.target)) if before.op == "call_module" else None
        once = convolution is not None and calls[str(before.target)] == calls[str(node.target)] == 1
        if isinstance(convolution, nn.Conv2d) and once and list(before.users) == [node]:
            norm = modules[str(node.target)]
            # Not fuse_conv_bn_eval, which copies the weights once more in between.
            convolution.weight, convolution.bias = fuse_conv_bn_weights(
                convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight,
                norm.bias,
            )  # fmt: skip
            node.replace_all_uses_with(before)
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
