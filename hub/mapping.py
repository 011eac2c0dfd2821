"""Published tensors <-> our parameters: one declarative table per format, read in both directions.

A table's row pairs the name of a published tensor with the path of a parameter (or of several, packed into one tensor)
and says how the axes are rearranged, as an einops pattern; patterns are their own inverses, so the same row loads and
saves. Names hold fields in braces: `{i}` is the layer, any other letter a further index.

    Row("blocks.{i}.attn.proj.weight", "encoder/blocks_{i}/attn/out/kernel", "D (N H) -> N H D")
    Row("blocks.{i}.attn.qkv.bias", tuple(f"encoder/blocks_{{i}}/attn/{x}/bias" for x in QKV), "(N H) -> N H")

A field that only one side has is a leading axis of the other side. So `experts.{e}.up` -> `experts/up` stacks experts,
and where the model scans over its layers (`encoder/blocks/…` with a leading layer axis), `_{i}` drops out of the paths
by itself: tables are written for the unrolled layout only.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from .files.progress import shown
from .files.tensors import LazyTensor, Renames, TensorFile, nearest, num_bytes, rename

Tree = dict[str, Any]  # nested dict of arrays or shapes
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One published tensor and the parameters it holds (see the module's docstring)."""

    source: str
    target: str | tuple[str, ...]
    pattern: str = ""  # from the axes of the published tensor to those of each parameter; "": unchanged
    axis: int = 0  # of the published tensor, along which several targets are packed
    sizes: Mapping[str, int] = field(default_factory=dict)  # axes of the pattern that the parameter's shape leaves open
    optional: bool = False  # a file without it gives zeros

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,) if isinstance(self.target, str) else self.target


@dataclass(frozen=True)
class Table:
    """The rows of one published format, and what its files may hold besides.

    Several rows may have the same target: then they are alternative layouts; a file has to hold one of them, and saving
    writes the first. `renames` (regex, replacement) are applied, in order, to the names in a file: they turn names of
    other eras and prefixes into those of the rows. `ignore` lists regexes of (renamed) names that hold no parameter.
    """

    rows: Sequence[Row]
    renames: Renames = ()
    ignore: Sequence[str] = ()

    def ignores(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.ignore)


def load_params(file: TensorFile, table: Table, target: Tree, *, dtype: DTypeLike | None = None) -> Tree:
    """Reads parameters from `file` straight into place.

    `target` is the tree of parameters as `jax.ShapeDtypeStruct`, whose sharding, where given, says on which devices
    each part goes: only that part is read there. Host memory stays near the largest published tensor. Floating-point
    tensors keep the file's dtype unless `dtype` is given (float64 becomes float32, as everywhere in JAX).

    Raises ValueError with every missing, unexpected and misshapen tensor, what was got and expected, and the nearest
    names.
    """
    leaves = traverse_util.flatten_dict(target, sep="/")
    plans = _plan_loading(file, table, leaves)
    size = sum(num_bytes(tensor.shape, tensor.dtype) for tensor in file.values())
    items = shown(list(plans.items()), f"Reading {file.path.name}", size)
    params = {path: _place(pieces, leaves[path], dtype) for path, pieces in items}
    return traverse_util.unflatten_dict(params, sep="/")


def check_params(file: TensorFile, table: Table, target: Tree) -> None:
    """Raises what `load_params` would, without reading a tensor."""
    _plan_loading(file, table, traverse_util.flatten_dict(target, sep="/"))


def add_tensors(params: Tree, table: Table, changes: Mapping[str, np.ndarray]) -> Tree:
    """`params` with something added to some published tensors (low-rank terms say), in float32.

    Raises ValueError for a change of no tensor of these, naming the nearest, and for one of another shape.
    """
    leaves: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    known: set[str] = set()
    for path, leaf in leaves.items():
        place = next(_places(table, path, shapes), None)
        for slot in place.slots() if place else ():
            known.add(slot.key)
            if (change := changes.get(slot.key)) is None:
                continue
            if change.shape != slot.place.published_shape:
                raise ValueError(f"{slot.key!r} changes by {change.shape}, expected {slot.place.published_shape}")
            more = jnp.asarray(slot.place.to_parameter(change[slot.lead]), jnp.float32)
            wide = leaves[path].astype(jnp.float32)
            leaves[path] = wide.at[slot.index].add(more) if slot.index else wide + more
        leaves[path] = leaves[path].astype(leaf.dtype)
    if unknown := sorted(changes.keys() - known):
        raise ValueError(f"no tensor {unknown[0]!r} to change{nearest(unknown[0], known)}")
    return traverse_util.unflatten_dict(leaves, sep="/")


def save_tensors(params: Tree, table: Table) -> dict[str, LazyTensor]:
    """The published tensors of `params`, widest dtype first so that files keep them aligned.

    Each is gathered and rearranged only when it is read. Reading is collective where parameters span several processes:
    all of them must read the same tensors in order. Raises ValueError for a parameter that the format has no place for.
    """
    leaves: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    slots: dict[str, list[_Slot]] = {}
    for path in leaves:
        place = next(_places(table, path, shapes), None)
        if place is None:
            raise ValueError(f"this format has no tensor for parameter {path!r} {shapes[path]}")
        for slot in place.slots():
            slots.setdefault(slot.key, []).append(slot)
    tensors = {key: _gathered(sources, leaves) for key, sources in slots.items()}
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


@dataclass(frozen=True)
class _Place:
    """A row applied to one parameter: which published tensors, and which window of each, make it up."""

    row: Row
    path: str
    shape: Shape  # of the parameter
    fields: Mapping[str, int]  # as found in the path
    stacked: tuple[str, ...]  # fields that are leading axes of the parameter
    leading: Mapping[str, int]  # fields that are leading axes of the published tensor -> their length
    widths: tuple[int, ...]  # of the packed parts, along row.axis
    part: int
    inner: Shape  # published shape without the leading axes

    @property
    def published_shape(self) -> Shape:
        return (*self.leading.values(), *self.inner)

    def slots(self) -> Iterator["_Slot"]:
        """One slot per index of the parameter's stacked axes."""
        for index in np.ndindex(self.shape[: len(self.stacked)]):
            fields = {**self.fields, **dict(zip(self.stacked, index, strict=True))}
            lead = tuple(fields[name] for name in self.leading)
            yield _Slot(self, self.row.source.format(**fields), lead, index)

    def to_parameter(self, tensor: np.ndarray) -> np.ndarray:
        """The window of a published tensor (leading axes already indexed), rearranged: a view where it can be."""
        if len(self.widths) > 1:
            window = [slice(None)] * tensor.ndim
            window[self.row.axis] = slice(sum(self.widths[: self.part]), sum(self.widths[: self.part + 1]))
            tensor = tensor[tuple(window)]
        if not self.row.pattern:
            return tensor
        sizes = dict(self.row.sizes)
        axes = re.findall(r"\([^)]*\)|\S+", self.row.pattern.split("->")[1])
        sizes |= {name: n for name, n in zip(axes, self.shape[len(self.stacked) :], strict=True) if name.isidentifier()}
        return rearrange(tensor, self.row.pattern, **sizes)


@dataclass(frozen=True)
class _Slot:
    """Index `lead` of published tensor `key` <-> index `index` of the parameter."""

    place: _Place
    key: str
    lead: tuple[int, ...]
    index: tuple[int, ...]


@dataclass(frozen=True)
class _Piece:
    """A slot and the file's tensor for it."""

    slot: _Slot
    tensor: LazyTensor

    def view(self) -> np.ndarray:
        return self.slot.place.to_parameter(self.tensor.view()[self.slot.lead])


def _places(table: Table, path: str, shapes: Mapping[str, Shape]) -> Iterator[_Place]:
    """The rows that give parameter `path`, in the table's order."""
    for row in table.rows:
        for part, template in enumerate(row.targets):
            unrolled = _template_regex(template).fullmatch(path)
            match = unrolled or _template_regex(template.replace("_{i}", "")).fullmatch(path)
            if not match:
                continue
            fields = {name: int(value) for name, value in match.groupdict().items()}
            sources, targets = _field_names(row.source), _field_names(template)
            scanned = () if unrolled else ("i",)
            stacked = (*scanned, *(name for name in sources if name not in targets))
            paths = [(t if unrolled else t.replace("_{i}", "")).format(**fields) for t in row.targets]
            if len(shapes[path]) < len(stacked) or any(other not in shapes for other in paths):
                continue
            inners = [_published_shape(row, shapes[other][len(stacked) :]) for other in paths]
            widths = tuple(inner[row.axis] for inner in inners) if len(inners) > 1 else ()
            inner = list(inners[0])
            if widths:
                inner[row.axis] = sum(widths)
            leading = {
                name: shapes[path][0] if name in scanned else _count(template, fields, name, shapes)
                for name in targets
                if name not in sources
            }
            yield _Place(row, path, shapes[path], fields, stacked, leading, widths, part, tuple(inner))


def _published_shape(row: Row, shape: Shape) -> Shape:
    """The published shape of a parameter's element, by rearranging an array that occupies no memory."""
    if not row.pattern:
        return shape
    parameter = np.broadcast_to(np.False_, shape)
    return rearrange(parameter, _inverse(row.pattern), **row.sizes).shape


def _inverse(pattern: str) -> str:
    left, right = pattern.split("->")
    return f"{right} -> {left}"


def _count(template: str, fields: Mapping[str, int], name: str, shapes: Mapping[str, Shape]) -> int:
    """How many values the field takes among the parameters."""
    return next(n for n in itertools.count() if template.format(**{**fields, name: n}) not in shapes)


@functools.cache
def _template_regex(template: str) -> re.Pattern[str]:
    """Matches the names of a template; a field is a number, the same wherever it stands."""
    parts, seen = [], set()
    for text, name in re.findall(r"([^{]*)(?:\{(\w+)\})?", template):
        parts.append(re.escape(text))
        if name:
            parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>\\d+)")
            seen.add(name)
    return re.compile("".join(parts))


@functools.cache
def _field_names(template: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(re.findall(r"\{(\w+)\}", template)))


def _plan_loading(file: TensorFile, table: Table, leaves: Mapping[str, Any]) -> dict[str, list[_Piece]]:
    """The tensors that make up each parameter (none: optional and absent), or one error with all that is wrong."""
    names = _canonical_names(file, table)
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    plans: dict[str, list[_Piece]] = {}
    missing: dict[str, _Place] = {}
    misfits: dict[str, str] = {}
    used: set[str] = set()
    for path, leaf in leaves.items():
        alternatives = [list(place.slots()) for place in _places(table, path, shapes)]
        assert alternatives, f"the table has no row for parameter {path!r}"
        present = [slots for slots in alternatives if all(slot.key in names for slot in slots)]
        if not present:
            optional = any(slots[0].place.row.optional for slots in alternatives)
            missing |= {} if optional else {slot.key: slot.place for slot in alternatives[0] if slot.key not in names}
            plans[path] = []
            continue
        misfit = [{s.key: why for s in slots if (why := _misfit(s, file[names[s.key]], leaf))} for slots in present]
        chosen = next((i for i, wrong in enumerate(misfit) if not wrong), 0)
        for key, why in misfit[chosen].items():
            misfits.setdefault(names[key], why)
        plans[path] = [_Piece(slot, file[names[slot.key]]) for slot in present[chosen]]
        used |= {slot.key for slot in present[chosen]}
    spare = [name for key, name in names.items() if key not in used and not table.ignores(key)]
    spare = [name for name in spare if math.prod(file.shape(name))]  # zero registers are a tensor too, of nothing
    problems = [
        *(f"missing {k!r}, expected {p.published_shape} for {p.path}{nearest(k, spare)}" for k, p in missing.items()),
        *(f"unexpected {k!r}, got {file.shape(k)}{nearest(k, missing or used)}" for k in spare),
        *(f"unfit {name!r}, {why}" for name, why in misfits.items()),
    ]
    if problems:
        raise ValueError(f"{file.path} does not fit the model:\n  " + "\n  ".join(problems))
    return plans


def _canonical_names(file: TensorFile, table: Table) -> dict[str, str]:
    """Name as the rows spell it -> name in the file."""
    names: dict[str, str] = {}
    for name in file:
        canonical = rename(name, table.renames)
        if canonical in names and not table.ignores(canonical):
            raise ValueError(f"{file.path}: {names[canonical]!r} and {name!r} are two names of one tensor")
        names[canonical] = name
    return names


def _misfit(slot: _Slot, tensor: LazyTensor, leaf: Any) -> str:
    """What is wrong with the tensor for this slot, in words; "" if it fits."""
    expected = slot.place.published_shape
    if tensor.shape != expected:
        return f"got shape {tensor.shape}, expected {expected} for {slot.place.path} {slot.place.shape}"
    if jnp.issubdtype(leaf.dtype, jnp.floating) and not jnp.issubdtype(tensor.dtype, jnp.floating):
        return f"got dtype {tensor.dtype}, expected a floating-point one for {slot.place.path}"
    return ""


def _place(pieces: Sequence[_Piece], leaf: Any, dtype: DTypeLike | None) -> jax.Array:
    """Reads one parameter into its devices."""
    canonical = jax.dtypes.canonicalize_dtype  # JAX has no 64 bits unless they are enabled
    wanted = jnp.result_type(*(canonical(piece.tensor.dtype) for piece in pieces)) if pieces else leaf.dtype
    if dtype is not None and jnp.issubdtype(wanted, jnp.floating):
        wanted = canonical(dtype)
    sharding = getattr(leaf, "sharding", None)
    if len(pieces) == 1 and not pieces[0].slot.index:
        return _put(pieces[0].view(), wanted, sharding)
    # Layer by layer into the stack on the devices: the host never holds the stack.
    stack = jnp.zeros(leaf.shape, wanted, device=sharding)
    for piece in pieces:
        index = piece.slot.index
        inner = sharding
        if isinstance(sharding, NamedSharding):
            inner = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[len(index) :]))
        stack = _stack_writer(sharding)(stack, _put(piece.view(), wanted, inner), np.asarray(index, np.int32))
    return stack


@functools.cache
def _stack_writer(sharding: Sharding | None) -> Callable[[jax.Array, jax.Array, np.ndarray], jax.Array]:
    def write(stack: jax.Array, element: jax.Array, index: jax.Array) -> jax.Array:
        return stack.at[tuple(index)].set(element)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _put(view: np.ndarray, dtype: np.dtype, sharding: Sharding | None) -> jax.Array:
    """Copies the view, or of it what each device needs, to the devices, and waits: pending copies would pile up."""
    if sharding is None:
        return jax.device_put(np.array(view, dtype, order="C")).block_until_ready()
    array = jax.make_array_from_callback(
        view.shape, sharding, lambda index: np.array(view[index], dtype, order="C"), dtype=dtype
    )
    return array.block_until_ready()


def _gathered(slots: Sequence[_Slot], leaves: Mapping[str, Any]) -> LazyTensor:
    """One published tensor out of the parameters that make it up."""
    place = slots[0].place
    by_lead: dict[tuple[int, ...], list[_Slot]] = {}
    for slot in sorted(slots, key=lambda slot: (slot.lead, slot.place.part)):
        by_lead.setdefault(slot.lead, []).append(slot)

    def publish(slot: _Slot) -> np.ndarray:
        leaf = leaves[slot.place.path]
        element = _to_host(leaf[slot.index] if slot.index else leaf)
        return rearrange(element, _inverse(place.row.pattern), **place.row.sizes) if place.row.pattern else element

    def view() -> np.ndarray:
        elements = [
            np.concatenate(list(map(publish, parts)), place.row.axis) if len(parts) > 1 else publish(parts[0])
            for parts in by_lead.values()
        ]
        return np.stack(elements).reshape(place.published_shape) if place.leading else elements[0]

    return LazyTensor(place.published_shape, np.dtype(leaves[place.path].dtype), view)


def _to_host(array: Any) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
