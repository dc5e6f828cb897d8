"""Where a model can be cut by layer, found from what its graph computes, not from names.

What depends only on masks, positions and constants is dropped first: every shard recomputes
it. Of the rest, the live nodes, those that every path from the embedding to the result passes
are the places where the model is narrow. A layer is what lies between such places and holds one
attention: the one that uses a cache in a decoder, any in an encoder. This module must not touch
a file (`sharding.cutting.graph` reads it) and must not cut (`sharding.cutting.cut` does).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from pathlib import Path

from sharding.cutting.graph import Graph, Node, read_graph
from sharding.cutting.manifest import Cache
from sharding.models.frames import SUPPORTED_DTYPES
from sharding.models.signature import TensorSpec

CUT_TENSORS_MAX = 2  # live tensors that may cross a cut: the residual sum, and what is added to it

# Fused attention: (input, output) of each cache tensor.
_FUSED_CACHES = {
    "GroupQueryAttention": ((3, 1), (4, 2)),
    "MultiHeadAttention": ((6, 1), (7, 2)),
    "DecoderMaskedMultiHeadAttention": ((5, 1), (6, 2)),
    "Attention": ((4, 1), (5, 2)),  # ai.onnx since opset 23, and its contrib namesake: (4, 1)
}
_FUSED_ATTENTION = frozenset(
    {*_FUSED_CACHES, "QAttention", "PackedAttention", "PackedMultiHeadAttention", "SparseAttention"}
)
# What a cache passes through on its way into an attention and out of it.
_CACHE_STEPS = frozenset(
    {"Cast", "Concat", "Expand", "Gather", "Identity", "Pad", "Reshape", "ScatterElements"}
    | {"ScatterND", "Slice", "Split", "Squeeze", "TensorScatter", "Transpose", "Unsqueeze"}
    | {"DequantizeLinear", "QuantizeLinear"}
)
_CACHE_STEPS_MAX = 12
_SAME_SHAPE = frozenset(
    {"Cast", "Identity", "Dropout", "DequantizeLinear", "LayerNormalization"}
    | {"SimplifiedLayerNormalization", "RMSNormalization"}
)
_ELEMENTWISE = frozenset({"Add", "Div", "Mul", "Pow", "Sub"})
_LOOKUPS = frozenset({"Gather", "GatherBlockQuantized"})
_PRODUCTS = frozenset({"MatMul", "MatMulInteger", "QLinearMatMul", "Einsum", "FusedMatMul", "Gemm"})
_PRODUCTS |= {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
_SOFTMAX_STEPS_MAX = 8  # from a softmax to the product with the values
_FLOATS = frozenset({"float16", "float32", "float64", "bfloat16"})


@dataclass(frozen=True)
class Cut:
    """A place to cut: before node `before`, where `tensors` are all that is live.

    Everything that `before` and what follows it needs besides these can be recomputed.
    """

    before: str
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Layer:
    """One layer. `weight_bytes` are those of the weights that its live nodes use."""

    index: int
    weight_bytes: int
    caches: tuple[Cache, ...]


@dataclass(frozen=True)
class ShapeOf:
    """`output` is the shape of an embedding, or of a sum of several.

    Each of `tables` is (ids, width): looking up the ids gives their shape and a last dimension
    of `width`. A shard without the embedding computes it from the ids, which are an input or
    derived from one; of a sum it is the largest in each dimension.
    """

    output: str
    tables: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class LayerMap:
    """The layers of a model, first to last, and the cut before each of them but the first.

    `cuts[i]` lies between layers `i` and `i + 1`. The embedding is in the first layer's part
    and the head (the last norm, the logits) in the last one's; their weights are counted apart:
    `embedding_bytes`, `head_bytes`. A tied table counts in both, since both parts carry it if
    they lie in different shards. `shared_bytes` are weights that every shard may need, such as
    rotary tables. `kind` is "decoder" (it has caches) or "encoder".
    """

    path: str
    kind: str
    layers: tuple[Layer, ...]
    cuts: tuple[Cut, ...]
    embedding_bytes: int
    head_bytes: int
    shared_bytes: int
    inputs: tuple[TensorSpec, ...]  # of the uncut model, without the caches
    outputs: tuple[TensorSpec, ...]  # of the uncut model, without the caches
    # For `sharding.cutting.cut`: the layer of every live node by its index in the file, and shapes
    # of the embedding that later layers ask for.
    owner: Mapping[int, int] = field(repr=False)
    shapes: tuple[ShapeOf, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.layers)


def find_boundaries(path: str | Path) -> LayerMap:
    """The layers of the ONNX model at `path`, a decoder or an encoder. Reads no external data.

    Raises `NotAModel`, saying why and where: no ONNX, nothing that looks like an embedding or
    another float input, no attention, or two layers between which more than `CUT_TENSORS_MAX`
    live tensors pass everywhere.
    """
    return map_layers(read_graph(path))


def map_layers(graph: Graph) -> LayerMap:
    """The same, of a graph that was read already."""
    caches = tuple(_caches(graph))
    live = _liveness(graph, caches)
    anchors = _cache_anchors(graph, live, caches) if caches else _attention_anchors(graph, live)
    if not anchors:
        raise graph.refuse(
            "a graph without any",
            "attention (a softmax before a product, or a fused operator) to count layers by",
            "It can be run whole in one browser.",
        )
    levels = _levels(live, anchors)
    n_layers = max(levels.values())
    trunk = _trunk(graph, live)
    places = [_place(graph, live, levels, trunk, anchors, level) for level in range(1, n_layers)]
    owner = {node.index: sum(node.index in place.later for place in places) for node in live.nodes}
    cuts = [
        Cut(str(place.before), _cut_tensors(graph, live, place.before, place.names))
        for place in places
    ]
    for layer, cut in enumerate(cuts, start=1):
        _check_cut(graph, live, owner, cut, layer)
    return _layer_map(graph, live, levels, trunk, caches, tuple(cuts), owner)


# -- what is live ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Live:
    """`nodes` in order; `seeds` are the live tensors that no live node makes."""

    nodes: tuple[Node, ...]
    tensors: frozenset[str]
    seeds: frozenset[str]
    embeddings: tuple[Node, ...]  # the look-ups among the live nodes
    shapes: Mapping[int, ShapeOf]  # by the index of the Shape node, which does not count as live
    consumers: Mapping[str, tuple[Node, ...]]
    weights: frozenset[str]  # and what is computed from weights alone

    def inputs(self, node: Node) -> tuple[str, ...]:
        return tuple(name for name in node.uses if name in self.tensors)


def _liveness(graph: Graph, caches: Sequence[tuple[Node, str, str]]) -> _Live:
    """Seeds are the embedding look-ups and embeddings that are given (`inputs_embeds`, which have
    three dimensions); without any of them, an image (four). A float mask has four as well.
    """
    past = {name for _, name, _ in caches}
    floats = [
        spec
        for spec in graph.inputs.values()
        if spec.name not in past and spec.dtype in _FLOATS and (spec.rank or 3) >= 3
    ]
    embeddings = _embeddings(graph)
    seeds = {spec.name for spec in floats if spec.rank in (3, None)}
    if not seeds and not embeddings:
        seeds = {spec.name for spec in floats}
    if not seeds and not embeddings:
        raise graph.refuse(
            f"inputs {', '.join(map(str, graph.inputs))} and no such look-up",
            "a graph that looks up token ids in a table, or takes embeddings or an image",
            "It can be run whole in one browser.",
        )
    lookups = {node.index for node in embeddings}
    tensors = set(seeds)
    nodes = []
    shapes: dict[int, ShapeOf] = {}
    for node in graph.nodes:
        if node.index in lookups or not tensors.isdisjoint(node.uses):
            if node.op == "Shape":
                if node.inputs[0] in graph.inputs:
                    continue  # any shard can be given the input
                if shape := _embedding_shape(graph, node, lookups):
                    shapes[node.index] = shape
                    continue
            nodes.append(node)
            tensors.update(filter(None, node.outputs))
    live = frozenset(tensors)
    consumers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.uses:
            if name in live:
                consumers.setdefault(name, []).append(node)
    return _Live(
        tuple(nodes),
        live,
        frozenset(seeds),
        embeddings,
        shapes,
        {name: tuple(users) for name, users in consumers.items()},
        frozenset(_constant_tensors(graph)),
    )


def _embeddings(graph: Graph) -> tuple[Node, ...]:
    """Look-ups of ids that are given, in the widest tables that there are.

    Narrower tables are rotary ones (as wide as half a head), which every shard may have.
    """
    from_values = _value_dependent(graph)
    constant = _constant_tensors(graph)
    found: list[tuple[int, Node]] = []
    for node in graph.nodes:
        if node.op not in _LOOKUPS or len(node.inputs) < 2 or node.ints.get("axis", 0) != 0:
            continue
        table, ids = node.inputs[:2]
        if table not in constant or ids not in from_values:
            continue
        width, out = _width(graph, node), graph.specs.get(node.outputs[0])
        if width is None or (out is not None and out.rank is not None and out.rank < 3):
            continue
        found.append((width, node))
    widest = max((width for width, _ in found), default=0)
    return tuple(node for width, node in found if width == widest)


def _table_shape(graph: Graph, name: str) -> tuple[int, ...]:
    """The shape of `name`, which is made of weights; if unknown, that of the largest of them."""
    if name in graph.constants:
        return graph.constants[name].shape
    node = graph.producer[name]
    spec = graph.specs.get(name)
    if spec is not None and spec.shape is not None and None not in spec.shape:
        return tuple(dim for dim in spec.shape if isinstance(dim, int))
    shapes = [_table_shape(graph, used) for used in node.uses]
    shape = max(shapes, key=lambda one: (len(one), one), default=())
    return shape[::-1] if node.op == "Transpose" else shape


def _constant_tensors(graph: Graph) -> set[str]:
    constant = set(graph.constants)
    for node in graph.nodes:
        if constant.issuperset(node.uses):
            constant.update(node.outputs)
    return constant


def _value_dependent(graph: Graph) -> set[str]:
    """Tensors that depend on the elements of an input, not on its shape alone."""
    found = {spec.name for spec in graph.inputs.values() if spec.dtype not in _FLOATS}
    for node in graph.nodes:
        if node.op not in ("Shape", "Size") and not found.isdisjoint(node.uses):
            found.update(node.outputs)
    return found


def _embedding_shape(graph: Graph, node: Node, lookups: AbstractSet[int]) -> ShapeOf | None:
    """If this Shape is that of embeddings that at most were added, scaled or cast since."""
    if node.ints.get("start", 0) != 0 or "end" in node.ints:
        return None
    tables: dict[tuple[str, int], int | None] = {}
    stack = [node.inputs[0]]
    while stack:
        maker = graph.producer.get(stack.pop())
        if maker is None:
            return None
        if maker.index in lookups:
            width, ids = _width(graph, maker), graph.specs.get(maker.inputs[1])
            if width is None:
                return None
            tables[maker.inputs[1], width] = ids.rank if ids is not None else None
        elif maker.op in _SAME_SHAPE:
            stack.append(maker.inputs[0])
        elif maker.op in _ELEMENTWISE:
            stack += [name for name in maker.inputs if not _is_scalar(graph, name)]
        else:
            return None
    if len(tables) > 1 and (None in tables.values() or len(set(tables.values())) > 1):
        return None  # they might be aligned at their ends
    return ShapeOf(node.outputs[0], tuple(tables)) if tables else None


def _width(graph: Graph, lookup: Node) -> int | None:
    """The last dimension of what is looked up."""
    out = graph.specs.get(lookup.outputs[0])
    width = out.shape[-1] if out is not None and out.shape else None
    if isinstance(width, int):
        return width
    shape = _table_shape(graph, lookup.inputs[0])
    # A packed table is narrower than what comes out of it.
    return shape[1] if len(shape) == 2 and lookup.op == "Gather" else None


def _is_scalar(graph: Graph, name: str) -> bool:
    if name in graph.constants:
        return graph.constants[name].shape in ((), (1,))
    maker = graph.producer.get(name)
    if maker is None:
        return False
    spec = graph.specs.get(name)
    return maker.op in ("Constant", "Cast") and spec is not None and spec.shape in ((), (1,))


# -- caches and attentions -------------------------------------------------------------------------


def _caches(graph: Graph) -> Iterator[tuple[Node, str, str]]:
    """Each cache: the node at which it meets the layer, its past input, its present output.

    A cache is an input that comes out again, longer: through a fused attention, or through
    steps that compute nothing.
    """
    for spec in graph.inputs.values():
        if spec.rank is not None and spec.rank < 3:
            continue
        if spec.name not in graph.consumers:
            continue
        if found := _follow_cache(graph, spec.name):
            yield found[0], spec.name, found[1]


def _follow_cache(graph: Graph, past: str) -> tuple[Node, str] | None:
    edge: list[tuple[str, Node | None]] = [(past, None)]
    seen = {past}
    for _ in range(_CACHE_STEPS_MAX):
        onward: list[tuple[str, Node | None]] = []
        for name, meeting in edge:
            if name != past and name in graph.outputs:
                return (meeting or graph.producer[name]), name
            for node in graph.consumers.get(name, ()):
                for output in _cache_outputs(node, name):
                    if output and output not in seen:
                        seen.add(output)
                        # It meets the layer where something else comes in.
                        meets = node.op in _FUSED_CACHES or node.op in (
                            "Concat",
                            "ScatterElements",
                            "ScatterND",
                            "TensorScatter",
                        )
                        onward.append((output, meeting or (node if meets else None)))
        edge = onward
    return None


def _cache_outputs(node: Node, name: str) -> Iterable[str]:
    pairs = _FUSED_CACHES.get(node.op)
    if pairs is not None:
        return [
            node.outputs[made]
            for taken, made in pairs
            if taken < len(node.inputs) and node.inputs[taken] == name and made < len(node.outputs)
        ]
    if node.op in _CACHE_STEPS and (node.inputs[0] == name or node.op == "Concat"):
        return node.outputs
    return ()


def _cache_anchors(
    graph: Graph, live: _Live, caches: Sequence[tuple[Node, str, str]]
) -> frozenset[int]:
    alive = {node.index for node in live.nodes}
    for node, past, _ in caches:
        if node.index not in alive:
            raise graph.refuse(
                f"cache {past!r}, which meets nothing live at {node}",
                "caches that each layer adds its own keys or values to",
                "Encoder-decoder models cannot be cut by layer yet.",
            )
    return frozenset(node.index for node, _, _ in caches)


def _attention_anchors(graph: Graph, live: _Live) -> frozenset[int]:
    found = set()
    for node in live.nodes:
        if node.op in _FUSED_ATTENTION or (node.op == "Softmax" and _reaches_product(live, node)):
            found.add(node.index)
    return frozenset(found)


def _reaches_product(live: _Live, softmax: Node) -> bool:
    """Are the weights that it makes multiplied with something live? A classifier's are not."""
    edge, seen = [softmax], {softmax.index}
    for _ in range(_SOFTMAX_STEPS_MAX):
        onward = []
        for node in edge:
            for name in node.outputs:
                for user in live.consumers.get(name, ()):
                    if user.op in _PRODUCTS and len(live.inputs(user)) > 1:
                        return True
                    if user.index not in seen:
                        seen.add(user.index)
                        onward.append(user)
        edge = onward
    return False


def _levels(live: _Live, anchors: AbstractSet[int]) -> dict[int, int]:
    """For each live node, how many attentions follow one another on the way to it, and it.

    Keys and values of one layer lie beside one another, so they have the same number.
    """
    level: dict[str, int] = {}
    levels: dict[int, int] = {}
    for node in live.nodes:
        before = max((level.get(name, 0) for name in live.inputs(node)), default=0)
        levels[node.index] = before + (node.index in anchors)
        for name in node.outputs:
            level[name] = levels[node.index]
    return levels


# -- narrow places ---------------------------------------------------------------------------------


def _trunk(graph: Graph, live: _Live) -> tuple[Node, ...]:
    """The nodes that every path from the seeds to the result passes, first to last.

    A node is on all paths if the paths to it times the paths from it are all that there are.
    The result is the output that the most nodes lead to.
    """
    depth: dict[str, int] = {}
    to_node: dict[int, int] = {}
    to_tensor: dict[str, int] = dict.fromkeys(live.seeds, 1)
    lookups = {node.index for node in live.embeddings}
    for node in live.nodes:
        inputs = live.inputs(node)
        depth.update(
            dict.fromkeys(node.outputs, 1 + max((depth.get(name, 0) for name in inputs), default=0))
        )
        paths = sum(to_tensor.get(name, 0) for name in inputs) + (node.index in lookups)
        to_node[node.index] = paths
        to_tensor.update(dict.fromkeys(node.outputs, paths))
    results = [name for name in graph.outputs if name in live.tensors]
    if not results:
        raise graph.refuse(
            "outputs that do not depend on it",
            "a result that depends on the embedding",
            "It can be run whole in one browser.",
        )
    result = max(results, key=lambda name: depth.get(name, 0))
    from_tensor: dict[str, int] = {result: 1}
    from_node: dict[int, int] = {}
    for node in reversed(live.nodes):
        paths = sum(from_tensor.get(name, 0) for name in node.outputs)
        from_node[node.index] = paths
        for name in live.inputs(node):
            from_tensor[name] = from_tensor.get(name, 0) + paths
    total = to_tensor[result]
    return tuple(
        node for node in live.nodes if to_node[node.index] * from_node[node.index] == total
    )


@dataclass(frozen=True)
class _Place:
    """Before node `before`, where `names` are live; `later` are the nodes after it, by index."""

    before: Node
    names: tuple[str, ...]
    later: frozenset[int]


def _place(
    graph: Graph,
    live: _Live,
    levels: Mapping[int, int],
    trunk: Sequence[Node],
    anchors: AbstractSet[int],
    level: int,
) -> _Place:
    """Where to cut between the attention number `level` and the next one.

    That is before the last node on the trunk at which two live tensors become one: the residual
    sum with what is added to it. So a norm after the sum stays with it, in the later shard, and
    the runtime can fuse the two as it does in the uncut model. Where there is none, before the
    last with one input. Where there is no trunk (something goes round all layers), at the last
    place in the order of the nodes where no more than two tensors are live.
    """
    here = [node for node in trunk if levels[node.index] == level]
    joints = [node for node in here if _joins(graph, live, trunk, node)]
    singles = [node for node in here if len(live.inputs(node)) == 1]
    if joint := next(iter((joints or singles)[::-1]), None):
        names = tuple(_before_bias(graph, live, name) for name in live.inputs(joint))
        biases = {graph.producer[name].index for name in set(live.inputs(joint)) - set(names)}
        return _Place(joint, names, frozenset(_descendants(live, joint) | biases))
    return _narrowest(graph, live, levels, anchors, level)


def _joins(graph: Graph, live: _Live, trunk: Sequence[Node], joint: Node) -> bool:
    """Do two ways meet here, one of them through a matrix? In a norm they meet without one."""
    if len(live.inputs(joint)) != CUT_TENSORS_MAX:
        return False
    on_trunk = {node.index for node in trunk}
    stack = list(live.inputs(joint))
    seen = set(stack)
    while stack:
        node = graph.producer.get(stack.pop())
        if node is None or node.index in on_trunk:
            continue
        if any(len(_table_shape(graph, name)) > 1 for name in node.uses if name in live.weights):
            return True
        fresh = [name for name in live.inputs(node) if name not in seen]
        seen.update(fresh)
        stack += fresh
    return False


def _narrowest(
    graph: Graph,
    live: _Live,
    levels: Mapping[int, int],
    anchors: AbstractSet[int],
    level: int,
) -> _Place:
    """The last place between the two attentions where the fewest tensors are live."""
    last_use: dict[str, int] = {}
    for place, node in enumerate(live.nodes):
        last_use.update(dict.fromkeys(live.inputs(node), place))
    attentions = {
        place: levels[node.index] for place, node in enumerate(live.nodes) if node.index in anchors
    }
    start = max(place for place, its in attentions.items() if its <= level)
    end = min(place for place, its in attentions.items() if its > level)
    alive = [*live.seeds]
    best: tuple[int, list[str]] | None = None
    for place, node in enumerate(live.nodes[:end]):
        alive = [name for name in (*alive, *node.outputs) if last_use.get(name, -1) > place]
        if place >= start and (best is None or len(alive) <= len(best[1])):
            best = place + 1, alive
    if best is not None and len(best[1]) <= CUT_TENSORS_MAX:
        place, names = best
        later = frozenset(node.index for node in live.nodes[place:])
        return _Place(live.nodes[place], tuple(names), later)
    found = f"{len(best[1])} ({', '.join(best[1])})" if best else "mixed layers"
    raise graph.refuse(
        f"{found} at the narrowest place between layers {level - 1} and {level}",
        f"at most {CUT_TENSORS_MAX} live tensors there",
        "It can be run whole in one browser.",
    )


def _descendants(live: _Live, start: Node) -> set[int]:
    """The nodes that need `start`, and itself, by index."""
    found = {start.index}
    made = set(start.outputs)
    for node in live.nodes:
        if node.index not in found and not made.isdisjoint(node.uses):
            found.add(node.index)
            made.update(node.outputs)
    return found


def _check_cut(graph: Graph, live: _Live, owner: Mapping[int, int], cut: Cut, layer: int) -> None:
    """Nothing else that is live gets into `layer` and those after it."""
    maker = {name: owner[node.index] for node in live.nodes for name in node.outputs}
    allowed = {spec.name for spec in cut.tensors}
    for node in live.nodes:
        if owner[node.index] < layer:
            continue
        passing = [
            name for name in live.inputs(node) if maker.get(name, 0) < layer and name not in allowed
        ]
        if passing:
            raise graph.refuse(
                f"{', '.join(passing)} used by {node} too",
                f"only {', '.join(allowed)} to pass from layer {layer - 1} to {layer}",
                "It can be run whole in one browser.",
            )


def _cut_tensors(
    graph: Graph, live: _Live, joint: Node, names: Sequence[str]
) -> tuple[TensorSpec, ...]:
    """What is known of `names`, which meet at `joint`.

    What is unknown of them is what is known of the embedding: the residual sum is as long as
    that everywhere.
    """
    models = [graph.specs[n] for n in (*names, *joint.outputs) if n in graph.specs]
    for node in live.embeddings:
        models += [graph.specs[n] for n in node.outputs if n in graph.specs]
    models += [graph.inputs[n] for n in live.seeds if n in graph.inputs]
    dtypes = [spec.dtype for spec in models if spec.dtype in _FLOATS]
    found = []
    for name in names:
        spec = graph.specs.get(name) or TensorSpec(name, "", None)
        dtype = spec.dtype or next(iter(dtypes), "")
        if dtype not in SUPPORTED_DTYPES:
            raise graph.refuse(
                f"{name!r} of {dtype or 'unknown type'} before {joint}",
                f"one of {', '.join(sorted(SUPPORTED_DTYPES))} to pass between layers",
                "Export it in float16 or float32, with the types of its tensors.",
            )
        shape = spec.shape
        for other in models:
            if shape is None or (other.rank == len(shape) and None in shape):
                shape = _completed(shape, other.shape)
        found.append(TensorSpec(name, dtype, shape))
    return tuple(found)


def _before_bias(graph: Graph, live: _Live, name: str) -> str:
    """`name`, or what it was before a bias was added to a product.

    The runtime fuses such a bias into the norm that follows; that of a quantized product it
    fuses into the product.
    """
    node = graph.producer.get(name)
    if node is None or node.op != "Add" or len(live.consumers.get(name, ())) > 1:
        return name
    inputs = live.inputs(node)
    others = [other for other in node.inputs if other not in inputs]
    if len(inputs) != 1 or len(others) != 1 or name in graph.outputs:
        return name
    product = graph.producer.get(inputs[0])
    is_bias = others[0] in live.weights and len(_table_shape(graph, others[0])) == 1
    return inputs[0] if is_bias and product is not None and product.op == "MatMul" else name


def _completed(
    shape: tuple[int | str | None, ...] | None, other: tuple[int | str | None, ...] | None
) -> tuple[int | str | None, ...] | None:
    """`shape` with its unknown dimensions from `other`, unless their last ones differ."""
    if shape is None or other is None:
        return shape or other
    if len(shape) != len(other) or (shape[-1] or other[-1]) != other[-1]:
        return shape
    return tuple(mine if mine is not None else its for mine, its in zip(shape, other, strict=True))


# -- the result ------------------------------------------------------------------------------------


def _layer_map(
    graph: Graph,
    live: _Live,
    levels: Mapping[int, int],
    trunk: Sequence[Node],
    caches: Sequence[tuple[Node, str, str]],
    cuts: tuple[Cut, ...],
    owner: dict[int, int],
) -> LayerMap:
    n_layers = len(cuts) + 1
    # The head begins where another layer would.
    last = [node for node in trunk if levels[node.index] == n_layers]
    joints = [node for node in last if _joins(graph, live, trunk, node)]
    head = _descendants(live, joints[-1]) if joints else set()
    lookups = {node.index for node in live.embeddings}
    alive = {node.index for node in live.nodes}
    used: dict[int | str, set[str]] = {}
    for node in graph.nodes:
        part: int | str = "shared"
        if node.index in head:
            part = "head"
        elif node.index in lookups:
            part = "embedding"
        elif node.index in alive:
            part = owner[node.index]
        used.setdefault(part, set()).update(n for n in node.uses if n in graph.constants)
    # A weight that is transposed or unpacked first is its user's.
    folded = _folded_weights(graph)
    for node in graph.nodes:
        if node.index in alive:
            part = "head" if node.index in head else owner[node.index]
            part = "embedding" if node.index in lookups else part
            for name in node.uses:
                used.setdefault(part, set()).update(folded.get(name, ()))
    taken = set().union(*(names for part, names in used.items() if part != "shared"))
    used["shared"] = used.get("shared", set()) - taken
    # And one that several layers use is everybody's.
    layers_using: dict[str, int] = {}
    for layer in range(n_layers):
        for name in used.get(layer, ()):
            layers_using[name] = layers_using.get(name, 0) + 1
    everybodys = {name for name, count in layers_using.items() if count > 1}
    used["shared"] |= everybodys

    def size(part: int | str) -> int:
        names = used.get(part, set()) - (everybodys if part != "shared" else set())
        return sum(graph.constants[name].bytes for name in names)

    kept: dict[int, list[Cache]] = {}
    for node, past, present in caches:
        layer = owner[node.index]
        specs = (graph.inputs[past], graph.outputs[present])
        window = node.ints["local_window_size"] if node.ints.get("sliding_window_cache") else 0
        kept.setdefault(layer, []).append(Cache(layer, *_cache_specs(graph, node, *specs), window))
    pasts = {past for _, past, _ in caches}
    presents = {present for _, _, present in caches}
    return LayerMap(
        str(graph.path),
        "decoder" if caches else "encoder",
        tuple(Layer(i, size(i), tuple(kept.get(i, ()))) for i in range(n_layers)),
        cuts,
        size("embedding"),
        size("head"),
        size("shared"),
        tuple(spec for spec in graph.inputs.values() if spec.name not in pasts),
        tuple(spec for spec in graph.outputs.values() if spec.name not in presents),
        owner,
        tuple(live.shapes.values()),
    )


def _cache_specs(
    graph: Graph, node: Node, past: TensorSpec, present: TensorSpec
) -> tuple[TensorSpec, TensorSpec]:
    """Both with the size of a head, which the builder leaves open, but whose owner needs it to
    make the first, empty cache."""
    if node.op != "GroupQueryAttention" or past.shape is None or isinstance(past.shape[-1], int):
        return past, present
    query = graph.specs.get(node.inputs[0])
    width = query.shape[-1] if query is not None and query.shape else None
    heads = node.ints["num_heads"]
    if not (len(node.inputs) > 1 and node.inputs[1]):  # keys and values lie behind the queries
        heads += 2 * node.ints["kv_num_heads"]
    if not isinstance(width, int) or width % heads or present.shape is None:
        return past, present
    size = (width // heads,)
    return (
        replace(past, shape=past.shape[:-1] + size),
        replace(present, shape=present.shape[:-1] + size),
    )


def _folded_weights(graph: Graph) -> dict[str, set[str]]:
    """For tensors computed from weights alone: these weights."""
    folded: dict[str, set[str]] = {}
    constant = _constant_tensors(graph)
    for node in graph.nodes:
        if node.uses and constant.issuperset(node.uses):
            names = set()
            for name in node.uses:
                names |= {name} if name in graph.constants else folded.get(name, set())
            folded.update(dict.fromkeys(node.outputs, names))
    return folded
