"""What our norms are set to, by the names that a checkpoint has for them."""

from flax import nnx

from vdiff_jax.models.layers import GroupNorm, LayerNorm


def norms_by_their_name(make, bindings):
    """Epsilon and number of groups (0 for a layer norm) of every norm of the module `make()` builds.

    bindings: those of its parameters, see `interop.weights.bind`.
    """
    theirs = {b.ours.removesuffix(".scale"): b.theirs.removesuffix(".weight") for b in bindings}
    found = {}
    for path, node in nnx.iter_graph(nnx.eval_shape(make)):
        if isinstance(node, GroupNorm | LayerNorm):
            name = theirs[".".join(map(str, path))]
            found[name] = [node.epsilon, node.groups if isinstance(node, GroupNorm) else 0]
    return found
