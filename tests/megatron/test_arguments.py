"""What goes with --optimizer came, and what is refused, without starting Megatron."""

from argparse import Namespace
from dataclasses import fields

import pytest
import torch

from megatron_came.core.hyperparameters import Hyperparameters
from megatron_came.megatron.arguments import check, given_flags, hyperparameters
from megatron_came.megatron.checkpoints import refusals as checkpoints
from megatron_came.megatron.rules import RULES
from megatron_came.rules import refusal

CAME = {f"came_{field.name}": field.default for field in fields(Hyperparameters)}


def arguments(**changes):
    settings = {"optimizer": "came", "came_momentum_dtype": "fp32", "came_main_params": "fp32"}
    settings |= CAME
    return Namespace(**{**settings, **changes})


def test_the_defaults_are_the_authors():
    assert hyperparameters(arguments()) == Hyperparameters()
    check(arguments(), ["--optimizer", "--came-beta1"])


@pytest.mark.parametrize("flag", [{"init_model_with_meta_device": True}, {}])
def test_weights_without_values_are_those_of_a_checkpoint(flag):
    """Of a host that has no such flag of Megatron's loop, its own."""
    empty = {"perform_initialization": False, **flag}
    check(arguments(**empty), [])
    check(arguments(**empty, load="folder"), [])
    check(arguments(**empty, load=None, pretrained_checkpoint="folder"), [])
    # A host may have filled a model that it has built.
    check(arguments(**empty, load=None, model_chunks=[torch.nn.Identity()]), [])
    # One that fills it later, as ms-swift does from safetensors, gives the flag by itself.
    check(arguments(perform_initialization=False, load=None), [])


def test_local_checkpoints_have_a_format_of_their_own():
    saving = {"ckpt_format": "torch", "save": "folder", "non_persistent_save_interval": 9}
    check(arguments(**saving, async_save=True, non_persistent_ckpt_type="local"), [])


def test_an_evaluation_has_no_schedule_to_warm_up():
    check(arguments(skip_train=True, lr_warmup_iters=8, train_iters=8), [])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bf16": False, "fp16": True}, "the model's are fp16: add --bf16"),
        ({"use_distributed_optimizer": False}, "add --use-distributed-optimizer"),
        (
            {"load_main_params_from_ckpt": True},
            "--load-main-params-from-ckpt does not go with --came-main",
        ),
        ({"log_params_norm": True}, "--log-params-norm does not go with --came-main-params"),
        ({"qk_clip": True}, "--qk-clip does not go with --came-main-params remainder"),
    ],
)
def test_what_remainders_do_not_go_with_is_refused(changes, sentence):
    fitting = {"came_main_params": "remainder", "bf16": True, "use_distributed_optimizer": True}
    check(arguments(**fitting), [])
    with pytest.raises(ValueError, match=sentence):
        check(arguments(**{**fitting, **changes}), [])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"came_beta1": 1.0}, "--came-beta1 1.0 is not allowed: it must be in [0, 1)."),
        (
            {"came_momentum_dtype": "fp8"},
            "--came-momentum-dtype fp8 is not allowed: use fp32 or bf16 or int8.",
        ),
        (
            {"came_main_params": "bf16"},
            "--came-main-params bf16 is not allowed: use fp32 or remainder.",
        ),
        (
            {"came_beta3": -0.1},
            "--came-beta3 -0.1 is not allowed: it must be in [0, 1).",
        ),
        ({"came_eps1": 0.0}, "--came-eps1 0.0 is not allowed: it must be a finite number above 0."),
        ({"came_eps2": float("nan")}, "--came-eps2 nan is not allowed"),
        ({"came_clip_threshold": 0.0}, "--came-clip-threshold 0.0 is not allowed"),
        ({"came_spike_guard": 0.0}, "--came-spike-guard 0.0 is not allowed: it must be a finite"),
        ({"came_spike_guard": float("nan")}, "--came-spike-guard nan is not allowed"),
        ({"came_log_diagnostics": True}, "TensorBoard and W&B: add --tensorboard-dir or"),
        (
            {"optimizer_cpu_offload": True},
            "--optimizer-cpu-offload needs the distributed optimizer: add --use-distributed-optim",
        ),
        ({"use_precision_aware_optimizer": True}, "--use-precision-aware-optimizer"),
        ({"optimizer_cuda_graph": True}, "--optimizer-cuda-graph, whose replays would go on with"),
        (
            {"came_cuda_graph": True, "came_kernels": "numba"},
            "--came-cuda-graph is for Triton's kernels: leave it or --came-kernels numba out.",
        ),
        ({"fp4_param_gather": True}, "leave it out, and weights are gathered in bf16"),
        (
            {"gtp_weight_remat_size": 2, "tensor_parallel_num_weight_shards": 4},
            "--tensor-parallel-num-weight-shards 4: leave it out",
        ),
        ({"use_layer_wise_distributed_optimizer": True}, "a layer-wise optimizer"),
        ({"use_legacy_models": True}, "--use-legacy-models: leave it out"),
        ({"yaml_cfg": "run.yaml"}, "--yaml-cfg run.yaml: give the settings as flags"),
        ({"freeze_all_layers": True}, "--freeze-all-layers: leave it out, since nothing"),
        (
            {
                "mtp_num_layers": 1,
                "pipeline_model_parallel_size": 2,
                "untie_embeddings_and_output_weights": False,
                "load": "folder",
            },
            "--mtp-num-layers 1, tied embeddings and checkpoints at --pipeline",
        ),
        ({"load": None, "init_model_with_meta_device": True}, "-meta-device needs a check"),
        ({"load": "", "init_model_with_meta_device": True}, "checkpoint: add --load, or leave"),
        (
            {"ckpt_format": "torch", "save": "folder", "async_save": True},
            "--async-save does not go with --ckpt-format torch: leave it out",
        ),
        (
            {
                "ckpt_format": "torch",
                "save": "folder",
                "non_persistent_save_interval": 9,
                "non_persistent_ckpt_type": "global",
            },
            "--non-persistent-save-interval 9 does not go with --ckpt-format torch: leave it out",
        ),
        (
            {"save": "folder", "non_persistent_save_interval": 9},
            "--non-persistent-save-interval needs --non-persistent-ckpt-type global, or leave",
        ),
        ({"lr_warmup_samples": 8, "train_samples": 8}, "--lr-warmup-samples 8 is not shorter"),
        ({"lr_warmup_fraction": 1.0}, "--lr-warmup-fraction 1.0 is not shorter"),
        ({"weight_decay": -0.1}, "--weight-decay -0.1 is not allowed: it must be a finite number"),
        ({"lr": float("inf")}, "--lr inf is not allowed"),
        (
            {"use_torch_fsdp2": True, "came_rule": [["*", "factored=no"]]},
            "factored in a --came-rule does not go with FSDP",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_with_came_is_refused(changes, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the sentence is compared below)
        check(arguments(**changes), [])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"use_distributed_optimizer": False}, "without FSDP: add --use-distributed-optimizer"),
        ({"use_megatron_fsdp": True, "ckpt_format": "fsdp_dtensor"}, "without FSDP: add"),
        ({"bf16": False}, "--fp8-param-gather needs --bf16"),
        ({"bf16": False, "fp16": True}, "--fp8-param-gather needs --bf16"),
        ({"came_main_params": "remainder"}, "completes bf16 weights, and --fp8-param-gather"),
        ({"fp4_param_gather": True}, "leave it out, and weights are gathered in bf16"),
        ({"save": "folder", "ckpt_format": "torch"}, "--ckpt-format torch does not go with"),
        ({"load": "folder", "ckpt_format": "torch"}, "not read here: use torch_dist."),
        ({"came_report_memory": True}, "--came-report-memory does not go with --fp8-param-gather"),
        ({"qk_clip": True}, "--qk-clip does not go with --fp8-param-gather"),
    ],
    ids=str,
)
def test_what_weights_in_fp8_do_not_go_with_is_refused(changes, sentence):
    fitting = {"fp8_param_gather": True, "use_distributed_optimizer": True, "bf16": True}
    fitting |= {"fp8_recipe": "mxfp8", "reuse_grad_buf_for_mxfp8_param_ag": True}
    for small in ("fp32", "bf16", "int8"):
        check(arguments(**fitting, came_momentum_dtype=small), [])
    with pytest.raises(ValueError, match=sentence):
        check(arguments(**{**fitting, **changes}), [])


@pytest.mark.parametrize(("version", "is_refused"), [("0.17.1", True), ("0.18.2", False)])
def test_experts_beside_reused_buffers_are_refused_where_megatron_spoils_them(
    monkeypatch, version, is_refused
):
    monkeypatch.setattr("megatron.core.package_info.__version__", version)
    reused = {"fp8_param_gather": True, "use_distributed_optimizer": True, "bf16": True}
    reused |= {"reuse_grad_buf_for_mxfp8_param_ag": True, "num_experts": 8}
    check(arguments(**reused, overlap_param_gather=True), [])
    problem = refusal(RULES, arguments(**reused))
    assert bool(problem) == is_refused
    assert problem is None or "on Megatron 0.17, which overwrites their gradients" in problem


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ckpt_format": "torch_dist"}, "needs --ckpt-format fsdp_dtensor"),
        (
            {"num_distributed_optimizer_instances": 2},
            "-instances 2 does not go with --use-megatron-fsdp: use 1",
        ),
        (
            {"num_moe_experts": 8},
            "--num-experts 8 does not go with .*: use --use-distributed-optimizer",
        ),
        (
            {"pipeline_model_parallel_size": 2},
            "--pipeline-model-parallel-size 2 does not go with .*: use",
        ),
        ({"fp8": "hybrid"}, "--fp8-format hybrid does not go with .*: leave it out"),
        ({"fp16": True}, "--fp16 does not go with --use-megatron-fsdp: use --bf16"),
        ({"megatron_fsdp_main_params_dtype": "auto"}, "-main-params-dtype than fp32: use that"),
        ({"megatron_fsdp_main_params_dtype": None}, "-main-params-dtype than fp32: use that"),
        (
            {"came_momentum_dtype": "int8"},
            "--came-momentum-dtype int8 does not go with .*: use fp32",
        ),
        ({"async_save": True}, "--async-save does not go with .*: leave it out"),
        (
            {"non_persistent_ckpt_type": "global"},
            "-ckpt-type global does not go with .*: leave it out",
        ),
        (
            {"swiglu": True, "data_parallel_sharding_strategy": "no_shard", "load": "folder"},
            "cannot save the two projections of --swiglu with --use-megatron-fsdp at",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_with_megatron_fsdp_is_refused(changes, sentence):
    fitting = {
        "use_megatron_fsdp": True,
        "ckpt_format": "fsdp_dtensor",
        "num_distributed_optimizer_instances": 1,
        "megatron_fsdp_main_params_dtype": torch.float32,
    }
    check(arguments(**fitting), [])
    with pytest.raises(ValueError, match=sentence):
        check(arguments(**{**fitting, **changes}), [])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optimizer_offload_fraction": 1.5}, "-fraction 1.5 is not allowed: it must be from 0"),
        ({"optimizer_offload_fraction": float("nan")}, "-fraction nan is not allowed"),
        ({"use_distributed_optimizer": False}, "add --use-distributed-optimizer"),
        ({"rl_offload_optimizer_during_inference": True}, "leave one of them out"),
        ({"log_params_norm": True}, "--log-params-norm does not go with --optimizer-cpu-offload"),
        ({"qk_clip": True}, "--qk-clip does not go with --optimizer-cpu-offload: leave it out"),
        ({"async_save": True}, "--async-save does not go with --optimizer-cpu-offload"),
        ({"use_precision_aware_optimizer": True}, "--use-precision-aware-optimizer: leave it out"),
    ],
    ids=str,
)
def test_what_does_not_go_with_offload_is_refused(changes, sentence):
    fitting = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
    fitting |= {"use_distributed_optimizer": True}
    check(arguments(**fitting), [])
    with pytest.raises(ValueError, match=sentence):
        check(arguments(**{**fitting, **changes}), [])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pipeline_model_parallel_size": 2}, "--pipeline-model-parallel-size 2 does not go with"),
        ({"expert_model_parallel_size": 2}, "with --use-torch-fsdp2: use 1."),
        ({"use_distributed_optimizer": True}, "leave one of them out"),
        ({"fp16": True}, "use --bf16"),
        ({"ckpt_format": "torch_dcp"}, "--ckpt-format torch_dcp does not go with"),
        ({"non_persistent_ckpt_type": "local"}, "use global"),
        ({"rl_offload_optimizer_during_inference": True}, "leave it out"),
        ({"init_model_with_meta_device": True}, "leave it out"),
        ({"untie_embeddings_and_output_weights": False}, "add --untie-embeddings-and-output"),
        ({"came_momentum_dtype": "int8"}, "--came-momentum-dtype int8 is not supported with"),
    ],
    ids=str,
)
def test_what_does_not_go_with_fsdp2_is_refused(changes, sentence):
    fitting = {"use_torch_fsdp2": True, "untie_embeddings_and_output_weights": True}
    fitting |= {"tensor_model_parallel_size": 2, "ckpt_format": "torch_dist"}
    check(arguments(**fitting), [])
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the sentence is compared below)
        check(arguments(**{**fitting, **changes}), [])
    assert sentence in str(error.value)
    assert "--use-torch-fsdp2" in str(error.value)
    assert "\n" not in str(error.value)
    check(arguments(**{**fitting, **changes, "use_torch_fsdp2": False}), [])


def test_local_checkpoints_of_fully_reshardable_state_are_refused():
    reshardable = {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}
    local = {"non_persistent_ckpt_type": "local", **reshardable}
    with pytest.raises(ValueError, match="--non-persistent-ckpt-type local does not go with"):
        check(arguments(**local), [])
    for fitting in (
        {"non_persistent_ckpt_type": "global"},
        *({name: False} for name in reshardable),
    ):
        check(arguments(**{**local, **fitting}), [])


def test_came_flags_without_came_are_refused():
    with pytest.raises(ValueError, match=r"--came-beta2 is a setting of CAME, .* is adam: add"):
        check(arguments(optimizer="adam"), given_flags(["--came-beta2=0.95", "--lr", "1"]))
    check(arguments(optimizer="adam", use_megatron_fsdp=True), [])


SAVED = Namespace(
    optimizer="came",
    no_save_optim=None,
    use_distributed_optimizer=True,
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1,
)
RUN = Namespace(**vars(SAVED), finetune=False, no_load_optim=None)


def changed(namespace, **changes):
    return Namespace(**{**vars(namespace), **changes})


@pytest.mark.parametrize(
    ("saved", "run", "sharding", "sentence"),
    [
        ({"optimizer": "adam"}, {}, None, "--optimizer adam, this run has --optimizer came"),
        ({}, {"optimizer": "adam"}, None, "--optimizer came, this run has --optimizer adam"),
        ({}, {"use_distributed_optimizer": False}, None, "saved with --use-distributed-optimizer"),
        ({"use_distributed_optimizer": False}, {}, None, "without --use-distributed-optimizer"),
        (
            {},
            {"tensor_model_parallel_size": 2},
            "dp_reshardable",
            "--dist-ckpt-optim-fully-reshardable",
        ),
    ],
    ids=str,
)
def test_checkpoints_that_cannot_be_resumed_are_refused(saved, run, sharding, sentence):
    problem = checkpoints.refusal(changed(SAVED, **saved), changed(RUN, **run), sharding)
    assert sentence in problem
    assert "--no-load-optim" in problem
    for way_out in ({"finetune": True}, {"no_load_optim": True}):
        assert (
            checkpoints.refusal(changed(SAVED, **saved), changed(RUN, **run, **way_out), sharding)
            is None
        )


def test_checkpoints_that_can_be_resumed_are_not_refused():
    other_size = changed(RUN, tensor_model_parallel_size=2)
    assert checkpoints.refusal(SAVED, RUN, "dp_reshardable") is None
    assert checkpoints.refusal(SAVED, other_size, "fully_reshardable") is None
    without = changed(SAVED, no_save_optim=True, optimizer="adam")
    assert "with --no-save-optim" in checkpoints.refusal(without, RUN, None)
    assert checkpoints.refusal(without, changed(RUN, no_load_optim=True), None) is None
    assert (
        checkpoints.refusal(changed(SAVED, optimizer="sgd"), changed(RUN, optimizer="adam"), None)
        is None
    )


@pytest.mark.parametrize("flag", ["--came-momentum-dtype", "--came-main-params"])
def test_an_empty_variable_of_a_shell_is_refused(flag):
    from argparse import Namespace

    from megatron_came.megatron.rules import RULES
    from megatron_came.rules import name_of, refusal

    assert "is not allowed: use fp32 or" in refusal(RULES, Namespace(**{name_of(flag): ""}))


def test_diagnostics_of_gradients_that_weights_overwrite_are_refused():
    given = {"fp8_param_gather": True, "bf16": True, "use_distributed_optimizer": True}
    given |= {"reuse_grad_buf_for_mxfp8_param_ag": True, "came_log_diagnostics": True}
    given |= {"tensorboard_dir": "logs"}
    check(arguments(**given, overlap_param_gather=True), [])
    with pytest.raises(ValueError, match="--came-log-diagnostics does not go with --reuse"):
        check(arguments(**given), [])
