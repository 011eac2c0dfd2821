"""The recipe of DINO, iBOT and DINOv2: schedules and rules as published, targets and gradients, resume, sharding."""

import dataclasses
import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax import hub
from omnax.data.images.masking import mask_crops
from omnax.train import main
from omnax.train.checkpoint import Checkpointer
from omnax.train.config import run_config_file, typed
from omnax.train.export import export
from omnax.train.optimizer import make_optimizer, weight_decay
from omnax.train.program import make_program
from omnax.train.recipes.dinov2 import recipe as recipe_module
from omnax.train.recipes.dinov2.self_distillation import compact, gather
from omnax.train.rules import flatten, match_rules
from omnax.train.settings import EmaConfig
from omnax.train.sharding import MeshConfig, make_mesh, param_specs
from omnax.train.state import TrainState
from references import self_distillation as reference

HEAD = {"prototypes": 16, "hidden": 24, "bottleneck": 8}


def config(arg="", **overrides):
    """The smoke config of an objective at a size that compiles in seconds."""
    settings = run_config_file(f"configs/dinov2.py:{arg}")
    settings.model.update({"width": 32, "depth": 1, "mlp_dim": 48, "num_heads": 2})
    settings.update({"batch_size": 8, "evaluators": (), "dino_head": HEAD})
    settings.mask.group = 2
    settings.crops.local_count = 1
    if settings.ibot_head is not None:
        settings.ibot_head = HEAD
    settings.update(overrides)
    return typed(recipe_module.Config, settings, {})


def published(arg):
    return typed(recipe_module.Config, run_config_file(f"configs/dinov2.py:{arg}"), {})


def batch(c, seed=0):
    """Random crops with masks of the config."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in recipe_module.batch_shapes(c).items()}
    if "masked" in arrays:
        hide = mask_crops(c.mask, c.grid, seed)
        arrays["masked"] = np.stack([hide({"position": i}, rng)["masked"] for i in range(c.batch_size)])
    return jax.tree.map(jnp.asarray, arrays)


def initial(c):
    """Parameters and variables, compiled: operation by operation they take seconds."""
    return jax.jit(recipe_module.make_recipe(c).init)(jax.random.PRNGKey(0))


@functools.cache
def parameters(objective):
    """Of all ways to centre, which have variables of their own."""
    return initial(config(f"objective={objective}"))[0]


def run(c, devices=1, steps=2, mesh=None):
    """States and metrics of some steps on random batches."""
    mesh = make_mesh(mesh or MeshConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        program = make_program(recipe_module.make_recipe(c), c, mesh)
        state = program.init(jax.random.key(0))
        metrics = []
        for step in range(steps):
            rows = {k: jax.device_put(x, program.batch[k].sharding) for k, x in batch(c, step).items()}
            state, out = program.update(state, rows)
            metrics.append(jax.device_get(out))
    return jax.device_get(state), metrics


@pytest.fixture(scope="module")
def trained():
    return run(config())


def test_compact_and_gather_find_the_masked_patches():
    rng = np.random.default_rng(0)
    masked = rng.random((4, 2, 6)) < 0.3
    patches = rng.normal(size=(4, 2, 6, 3)).astype(np.float32)
    places, weights = compact(jnp.asarray(masked), 2, 10)
    rows = gather(jnp.asarray(patches), places)
    for group in range(2):
        own = slice(2 * group, 2 * group + 2)
        expected = patches[own][masked[own]]
        shares = (masked[own] / np.maximum(masked[own].sum(-1, keepdims=True), 1))[masked[own]]
        np.testing.assert_array_equal(rows[group, : len(expected)], expected)
        np.testing.assert_allclose(weights[group, : len(expected)], shares, rtol=1e-6)
        assert not np.asarray(weights[group, len(expected) :]).any()


def test_loss_of_a_step_equals_a_crop_by_crop_computation():
    """Targets by Sinkhorn over all crops and over all masked patches, every term by the float64 twin."""
    c = config()
    step, arrays = recipe_module.make_step(c), batch(c)
    params, variables = initial(c)
    teacher = jax.tree.map(lambda p: p + 0.02 * jnp.sin(jnp.arange(p.size).reshape(p.shape)), params)
    state = TrainState(jnp.int32(0), params, {}, teacher, variables, jax.random.PRNGKey(1))
    total, (terms, _) = jax.jit(step.loss)(params, state, arrays, jax.random.PRNGKey(2))

    def heads(params, name, x):
        head = step.networks.dino_head if name == "dino_head" else step.networks.ibot_head
        return np.asarray(jax.jit(head.apply)({"params": params[name]}, x), np.float64)

    def body(params, images, masked=None):
        flat = images.reshape(-1, *images.shape[2:])
        masked = None if masked is None else masked.reshape(-1, 6, 6)
        out = jax.jit(step.networks.backbone.apply)({"params": params["backbone"]}, flat, masked=masked)
        return out["cls"].reshape(8, -1, 32), out["patches"].reshape(8, 2, 36, 32) if len(flat) == 16 else None

    cls_t, patches_t = body(teacher, arrays["global"])
    cls_s, patches_s = body(params, arrays["global"], arrays["masked"])
    cls_l, _ = body(params, arrays["local"])
    logits = heads(teacher, "dino_head", cls_t)
    targets = reference.sinkhorn_loop(logits.reshape(16, 16), 0.04).reshape(8, 2, 16)
    dino = reference.dino(heads(params, "dino_head", np.concatenate([cls_s, cls_l], 1)), targets)
    masked = np.asarray(arrays["masked"]).reshape(16, 36)
    logits = heads(teacher, "ibot_head", patches_t).reshape(16, 36, 16)
    targets = np.zeros_like(logits)
    targets[masked] = reference.sinkhorn_loop(logits[masked], 0.04)
    ibot = reference.ibot(heads(params, "ibot_head", patches_s).reshape(16, 36, 16), targets, masked)
    koleo = sum(np.mean([reference.koleo(part) for part in np.split(np.asarray(cls_s[:, i]), 4)]) for i in range(2))
    got = [terms[name] for name in ("dino_global", "dino_local", "ibot", "koleo")]
    # float32 logits divided by 0.04: 1e-6 of them is 2e-5 of a target
    np.testing.assert_allclose(got, [*dino, ibot, koleo], rtol=5e-5)
    np.testing.assert_allclose(total, sum(dino) + ibot + 0.1 * koleo, rtol=5e-5)


def test_losses_in_blocks_are_the_same():
    c = config()
    params, variables = initial(c)
    state = TrainState(jnp.int32(0), params, {}, params, variables, jax.random.PRNGKey(1))

    def terms(**losses):
        step = recipe_module.make_step(dataclasses.replace(c, losses=dataclasses.replace(c.losses, **losses)))
        return jax.jit(step.loss)(params, state, batch(c), jax.random.PRNGKey(2))

    total, (expected, _) = terms()
    blockwise, (got, _) = terms(block=7)
    # float32 logits divided by 0.04, as above; with exact logits: tests/objectives/test_prototypes.py
    np.testing.assert_allclose(blockwise, total, rtol=1e-5)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-5, err_msg=name)


def test_teacher_is_the_moving_average_and_gets_no_gradient(trained):
    c = config()
    before, _ = run(c, steps=1)
    after, metrics = trained
    momentum = 1 - (1 - c.ema.decay) * (1 + math.cos(math.pi * 1 / c.total_steps)) / 2
    old, new, student = (flatten(tree) for tree in (before.ema, after.ema, after.params))
    for path, value in new.items():
        np.testing.assert_allclose(value, momentum * old[path] + (1 - momentum) * student[path], atol=1e-6)
    assert all(np.isfinite(value) for step in metrics for value in step.values())


def test_eight_devices_equal_one(trained):
    """Data, parameters and prototypes split two ways each; the devices hold different numbers of masked patches."""
    state, metrics = run(config(), devices=8, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    for got, expected in zip(metrics, trained[1], strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
    for (path, value), expected in zip(flatten(state.ema).items(), flatten(trained[0].ema).values(), strict=True):
        np.testing.assert_allclose(value, expected, atol=2e-5, err_msg=path)


def test_prototypes_must_divide():
    c = config(dino_head={"prototypes": 17, "hidden": 24, "bottleneck": 8})
    params, _ = jax.eval_shape(recipe_module.make_recipe(c).init, jax.random.PRNGKey(0))
    mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])
    with pytest.raises(ValueError, match=r"dino_head/last_layer/direction.*does not divide \(8, 17\)"):
        param_specs(recipe_module.sharding_rules(c), params, mesh)


@pytest.mark.parametrize("centering", ["centering", "softmax_centering", "none"])
@pytest.mark.parametrize("objective", ["dino", "ibot"])
def test_other_objectives(objective, centering):
    teacher = {"centering": centering, "center_all_patches": objective == "ibot"}
    c = config(f"objective={objective}", teacher=teacher)
    recipe = recipe_module.make_recipe(c)
    params = parameters(objective)
    variables = jax.jit(lambda rng: recipe.init(rng)[1])(jax.random.PRNGKey(0))
    assert set(params) == {"backbone", "dino_head"}
    assert ("masked" in recipe.batch) == (objective == "ibot")
    names = {"dino", "ibot"} if objective == "ibot" else {"dino"}
    assert set(variables["center"]) == (names if centering != "none" else set())
    state = TrainState(jnp.int32(0), params, {}, params, variables, jax.random.PRNGKey(1))
    step = recipe_module.make_step(c)
    arrays = batch(c)
    total, (terms, new) = jax.jit(step.loss)(params, state, arrays, jax.random.PRNGKey(2))
    assert np.isfinite(total) and "koleo" not in terms and ("ibot" in terms) == (objective == "ibot")
    if centering == "centering":
        cls, patches = jax.jit(step.networks.tokens)(params, arrays["global"])
        logits = step.networks.cls_logits(params, cls)
        np.testing.assert_allclose(new["center"]["dino"], 0.1 * logits.mean((0, 1)), atol=1e-6)
        if objective == "ibot":
            logits = step.networks.patch_logits(params, patches.reshape(8, -1, 32))
            np.testing.assert_allclose(new["center"]["ibot"], 0.1 * logits.mean((0, 1)), atol=1e-6)


def test_centres_move_once_per_step_however_many_micro_batches():
    """Both centres of one step are those of the whole batch, with as unequal masks as can be; accumulation 1 and 4."""
    teacher = {"centering": "centering"}
    mask = {"kind": "random", "ratio": (0.1, 0.9), "share": 0.7, "stratified": False, "group": 2}
    centers = []
    for accumulation in (1, 4):
        c = config("objective=ibot", teacher=teacher, mask=mask, accumulation=accumulation)
        state, _ = run(c, steps=1)
        centers.append(state.variables["center"])
    counts = batch(c)["masked"].sum((1, 2, 3))
    assert counts[::4].sum() != counts[1::4].sum()
    assert np.abs(centers[0]["ibot"]).max() > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *centers)


def test_distillation_has_a_frozen_teacher_and_no_masks():
    c = config()
    c = dataclasses.replace(
        c,
        teacher=dataclasses.replace(c.teacher, frozen=True),
        teacher_model=dataclasses.replace(c.model, width=48),
    )
    recipe = recipe_module.make_recipe(c)
    assert "masked" not in recipe.batch
    (before, _), (after, metrics) = run(c, steps=0), run(c, steps=2)  # the warm-up begins at rate 0
    old, new = flatten(before.params), flatten(after.params)
    assert new["teacher/backbone/embed/cls_token"].shape == (1, 1, 48)
    changed = {path for path in old if (old[path] != new[path]).any()}
    assert not any(path.startswith("teacher/") for path in changed)
    assert any(path.startswith("backbone/") for path in changed)
    assert not any(path.startswith("teacher/") for path in flatten(after.ema))
    assert metrics[0]["masked_share"] == 1


def test_published_rules_of_the_short_recipe():
    """dinov2:dinov2/utils/param_groups.py for L/16 with decay 0.9 and patch_embed 0.2 (numbers: spec 5.6)."""
    c = published("recipe=short")
    c = dataclasses.replace(c, model=dataclasses.replace(c.model, scan=False))
    optimizer = recipe_module.make_optimizer_config(c)
    params, _ = jax.eval_shape(recipe_module.make_recipe(c).init, jax.random.PRNGKey(0))
    rates = match_rules(optimizer.lr_multiplier, flatten(params), "rates")
    decays = match_rules(optimizer.decay_multiplier, flatten(params), "decay")
    expected = {
        "backbone/embed/pos_embed": 0.9**25,
        "backbone/patch_embed/kernel": 0.2 * 0.9**25,
        "backbone/encoder/blocks_0/norm1/scale": 0.9**24,
        "backbone/encoder/blocks_23/mlp/fc1/kernel": 0.9,
        "backbone/norm/scale": 1.0,
        "dino_head/last_layer/direction": 1.0,
    }
    for path, rate in expected.items():
        np.testing.assert_allclose(rates[path], rate, rtol=1e-6)
    np.testing.assert_allclose([0.9**25, 0.2 * 0.9**25, 0.9**24], [0.0718, 0.0144, 0.0798], atol=5e-5)
    free = {path for path, value in decays.items() if value == 0}
    assert {"backbone/norm/scale", "backbone/encoder/blocks_3/scale1/gamma", "dino_head/fc1/bias"} <= free
    assert not free & {"backbone/embed/cls_token", "backbone/embed/mask_token", "dino_head/last_layer/gain"}
    scanned = recipe_module.make_optimizer_config(published("recipe=short"))
    assert dict(scanned.lr_multiplier)["backbone/encoder/blocks/.*"] == tuple(0.9 ** (24 - i) for i in range(24))


def cosine_scheduler(base, final, total, warmup=0):
    """The array of dinov2:dinov2/utils/utils.py CosineScheduler."""
    steps = np.arange(total - warmup)
    curve = final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / len(steps)))
    return np.concatenate([np.linspace(0, base, warmup), curve])


def test_published_schedules():
    """Learning rate, weight decay and momentum of every step looked at, as fractions of their peak."""
    c = published("recipe=short")
    total, lr, steps = c.total_steps, c.optimizer.lr, jnp.array([0, 1, 6000, 12_499, 12_500, 12_501, 50_000, 124_999])
    assert (total, c.batch_size) == (125_000, 2048)
    np.testing.assert_allclose(lr, 4e-3 * math.sqrt(2), rtol=1e-6)
    expected = cosine_scheduler(lr, 1e-6, total, 12_500)[steps]
    np.testing.assert_allclose(c.optimizer.schedule(steps, total), expected / lr, atol=1e-6)
    np.testing.assert_allclose(
        weight_decay(c.optimizer, steps, total), cosine_scheduler(0.04, 0.4, total)[steps], atol=1e-6
    )
    np.testing.assert_allclose(c.ema(steps, total), cosine_scheduler(0.992, 1, total)[steps], atol=1e-6)


@pytest.mark.parametrize("arg", ["dino", "ibot", "ibot_rand", "notes", "short", "full", "high_res", "distill"])
def test_published_configs_are_whole(arg):
    """Every rule matches, every shape fits: the abstract state of each recipe."""
    c = published(f"recipe={arg}")
    recipe = recipe_module.make_recipe(c)
    params, _ = jax.eval_shape(recipe.init, jax.random.PRNGKey(0))
    make_optimizer(recipe.players[0].optimizer, params, c.total_steps)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices())
    param_specs(recipe.sharding, params, mesh)
    assert recipe.flops_per_step > 1e13
    if arg == "full":
        sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}
        assert sizes == {"backbone": 303_655_168, "dino_head": 57_545_088, "ibot_head": 40_505_600}
        assert c.bound == 967 and c.mask.group == 12


def equations(jaxpr):
    """Of a program, inside loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        for jaxpr in (getattr(x, "jaxpr", x) for x in inner):
            if hasattr(jaxpr, "eqns"):
                yield from equations(jaxpr)


def traced_loss(c, gradient=False):
    """Equations of the loss of a step on abstract arrays."""
    recipe, step, key = recipe_module.make_recipe(c), recipe_module.make_step(c), jax.random.PRNGKey(0)
    params, variables = jax.eval_shape(recipe.init, key)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, {}, params, variables, key)
    loss = jax.grad(step.loss, has_aux=True) if gradient else step.loss
    return list(equations(jax.make_jaxpr(loss)(params, state, dict(recipe.batch), key).jaxpr))


def test_crops_share_one_trace_per_size():
    """As many matrix products for one local crop as for five: crops of a size go through the networks together."""
    counts = set()
    for count in (1, 5):
        c = config()
        c = dataclasses.replace(c, crops=dataclasses.replace(c.crops, local_count=count))
        counts.add(sum(equation.primitive.name == "dot_general" for equation in traced_loss(c)))
    assert len(counts) == 1 and counts.pop() > 20


def test_published_step_holds_no_head_activation_of_unmasked_patches():
    """L/14, batch 3072: of 1,572,864 patches of global crops, heads get at most 967 for each of 256 groups, forward
    and backward; and nothing of the teacher's blocks is kept for a backward pass (it would have all 24 layers)."""
    c = published("recipe=full,size=L/14")
    patches, bound = 3072 * 2 * 256, 256 * 967
    shapes = {variable.aval.shape for equation in traced_loss(c, gradient=True) for variable in equation.outvars}
    rows = {width: max(math.prod(s) // width for s in shapes if s[-1:] == (width,)) for width in (131072, 2048)}
    assert rows == {131072: bound, 2048: bound} and bound < patches / 6
    stacks = [s for s in shapes if s[:1] == (24,) and math.prod(s[1:-1]) == 3072 * 2 * 257]
    assert stacks == [(24, 3072 * 2, 257, 1024)]  # the student's, one of a block: rematerialised


@pytest.mark.parametrize(
    "overrides,message",
    [
        ({"mask.ratio": "(0.1, 1.5)"}, "'mask.ratio' is .*at most 1"),
        ({"crops.global_size": "26"}, "crops.global_size 26 is not divisible by model.patch_size 4"),
        ({"batch_size": "50"}, "batch_size 50 is not divisible into 1 micro-batches of groups of mask.group 48"),
        ({"ema": "None"}, "ema must be set"),
        ({"model.mask_token": "False"}, "losses.ibot needs model.mask_token=True"),
        ({"losses.block": "-1"}, "'losses.block' is -1, expected a number at least 0"),
        (
            {"losses.block": "64", "teacher.centering": "centering"},
            "losses.block balances targets by Sinkhorn-Knopp, but teacher.centering is 'centering'",
        ),
        ({"teacher.centering": "sinkhorn"}, "unknown teacher.centering 'sinkhorn', did you mean 'sinkhorn_knopp'"),
    ],
)
def test_bad_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        main.make_recipe("configs/dinov2.py", overrides)


def test_resumed_run_is_bit_equal_and_exports(tmp_path):
    """Teacher, centres, optimiser, crops and masks: four steps in one go, and stopped after two and continued."""
    small = {
        "model.depth": "1",
        "batch_size": "8",
        "mask.group": "4",
        "crops.local_count": "1",
        "evaluators": "('pca',)",
    }
    small |= {"log_every": "1", "save_every": "2", "total_steps": "4", "teacher.centering": "centering"}
    c, recipe = main.make_recipe("configs/dinov2.py", small)

    def train():
        main.train(c, recipe, tmp_path)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        with Checkpointer(tmp_path / "checkpoints", None) as checkpoints, jax.set_mesh(make_mesh(c.mesh)):
            state = checkpoints.restore(make_program(recipe, c, make_mesh(c.mesh)).state).state
            return [line["train/loss"] for line in lines if "train/loss" in line][-2:], jax.device_get(state)

    losses, state = train()
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    again, state_again = train()
    assert losses == again
    jax.tree.map(np.testing.assert_array_equal, state_again, state)
    assert np.abs(state.variables["center"]["ibot"]).max() > 0
    assert (tmp_path / "training.png").is_file() and (tmp_path / "pca.png").is_file()
    export(c, recipe, tmp_path, tmp_path / "out")
    bundle = hub.load(tmp_path / "out", num_heads=4)
    np.testing.assert_array_equal(bundle.params["norm"]["bias"], state.ema["backbone"]["norm"]["bias"])
    # With its heads the run teaches another: from the exported file, and from the run itself.
    export(c, recipe, tmp_path, tmp_path / "run", "run")
    student = dataclasses.replace(c, teacher=dataclasses.replace(c.teacher, frozen=True), teacher_model=c.model)
    average = jax.tree.map(jnp.asarray, state.ema)
    for given in (recipe_module.load(str(tmp_path / "run"), student), recipe_module.adapt(average, student)):
        assert list(given) == ["teacher"]
        jax.tree.map(np.testing.assert_array_equal, given["teacher"], state.ema)


def test_ema_config_is_the_teacher_momentum():
    momentum = EmaConfig(decay=0.994, decay_end=1.0)
    np.testing.assert_allclose(momentum(jnp.int32(0), 100), 0.994, rtol=1e-6)
    np.testing.assert_allclose(momentum(jnp.int32(100), 100), 1.0, rtol=1e-6)
