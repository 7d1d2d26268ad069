"""The prompt-free decoder against SAM's own decoder, and T tasks at once against one at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from blosam_monai.networks.lora import merge_lora
from blosam_monai.networks.prompt_decoder import PromptDecoder, TaskDecoder
from blosam_monai.networks.sam import import_segment_anything

KINDS = [("dense", "sam"), ("sparse:3", "sam"), ("both:2", "sam"), ("dense", "two_token"), ("both:2", "two_token")]


def perturb(decoder: PromptDecoder, seed: int = 0) -> PromptDecoder:
    """Move every trainable tensor of every task off its start, each by its own noise."""
    generator = torch.Generator().manual_seed(seed)
    for p in (*decoder.lower_parameters(), *decoder.upper_parameters()):
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return decoder


def single_tasks(decoder: PromptDecoder, make) -> list[PromptDecoder]:
    """One decoder of one task for each task of ``decoder``, with its values."""
    singles = []
    for t in range(decoder.tasks):
        single = make()
        single.load_adapter_state({name: value[t : t + 1] for name, value in decoder.adapter_state().items()})
        singles.append(single)
    return singles


def count(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


@pytest.fixture
def embedding() -> Tensor:
    return torch.randn(2, 256, 4, 4, generator=torch.Generator().manual_seed(7))


def sam_logits(sam, embedding: Tensor, sparse: Tensor, dense: Tensor) -> Tensor:
    """Low-resolution logits (B, masks, 4h, 4w) of ``segment_anything``'s own decoder."""
    h, w = embedding.shape[2:]
    return sam.mask_decoder.predict_masks(
        image_embeddings=embedding[:1],
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse[None],
        dense_prompt_embeddings=dense[None, :, None, None].expand(1, -1, h, w),
    )[0]


# Against SAM


def test_an_untrained_decoder_gives_sams_single_mask(small_sam, embedding):
    start = small_sam.prompt_encoder.no_mask_embed.weight[0]
    with torch.no_grad():
        expected = sam_logits(small_sam, embedding, torch.empty(0, 256), start)[:, 0]
        found = PromptDecoder(small_sam)(embedding)[:1, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_learned_prompts_act_as_prompts_given_to_sams_decoder(small_sam, embedding):
    decoder = PromptDecoder(small_sam, prompt="both:2")
    torch.manual_seed(0)
    for p in decoder.upper_parameters():
        nn.init.normal_(p)
    template, phi = decoder.template, decoder.phi
    with torch.no_grad():
        sparse = template.sparse_start + phi["sparse_prompt"][0]
        dense = small_sam.prompt_encoder.no_mask_embed.weight[0] + phi["dense_prompt"][0]
        expected = sam_logits(small_sam, embedding, sparse, dense)[:, 0]
        found = decoder(embedding)[:1, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_sparse_prompts_start_near_sams_positive_point_and_differ_from_each_other(small_sam):
    start = PromptDecoder(small_sam, prompt="sparse:3").template.sparse_start
    distance = (start - small_sam.prompt_encoder.point_embeddings[1].weight).norm(dim=1)
    assert (distance < 0.02 * 2 * 16).all()  # noise of 0.02 in 256 numbers: about 0.32
    assert (torch.pdist(start) > 0.1).all()


def test_two_tokens_give_the_foreground_minus_the_background_mask_of_sams_decoder(small_sam, embedding):
    decoder = perturb(PromptDecoder(small_sam, head="two_token"))
    task = copy.deepcopy(decoder.template)
    values = {name.split(".", 1)[1]: value[0] for name, value in decoder.adapter_state().items()}
    task.load_state_dict(values, strict=False)
    merge_lora(task)
    modeling = import_segment_anything().modeling
    reference = copy.deepcopy(small_sam)
    reference.mask_decoder = modeling.MaskDecoder(
        transformer_dim=256, transformer=task.transformer, num_multimask_outputs=1
    )
    reference.mask_decoder.iou_token.weight.data = small_sam.mask_decoder.iou_token.weight.data
    reference.mask_decoder.mask_tokens.weight.data = task.mask_tokens.data
    reference.mask_decoder.output_upscaling = task.output_upscaling
    reference.mask_decoder.output_hypernetworks_mlps = task.hypernetworks
    dense = small_sam.prompt_encoder.no_mask_embed.weight[0] + decoder.phi["dense_prompt"][0]
    with torch.no_grad():
        pair = sam_logits(reference, embedding, torch.empty(0, 256), dense)
        found = decoder(embedding)[:1, 0]
    torch.testing.assert_close(found, pair[:, 1] - pair[:, 0], atol=1e-5, rtol=0)


def test_building_and_moving_a_decoder_leaves_the_sam_as_it_was(small_sam, embedding):
    before = {name: value.clone() for name, value in small_sam.state_dict().items()}
    perturb(PromptDecoder(small_sam, tasks=2))(embedding)
    assert all(torch.equal(value, before[name]) for name, value in small_sam.state_dict().items())


# The task axis


@pytest.mark.parametrize(("prompt", "head"), KINDS)
def test_three_tasks_at_once_equal_three_separate_decoders(small_sam, embedding, prompt, head):
    decoder = perturb(PromptDecoder(small_sam, tasks=3, prompt=prompt, head=head)).double()
    singles = single_tasks(decoder, lambda: PromptDecoder(small_sam, prompt=prompt, head=head).double())
    with torch.no_grad():
        together = decoder(embedding.double())
        apart = torch.cat([single(embedding.double()) for single in singles], 1)
    assert together.shape == (2, 3, 16, 16)
    torch.testing.assert_close(together, apart, atol=1e-12, rtol=0)


@pytest.mark.parametrize("own", [False, True], ids=["shared embedding", "own embeddings"])
def test_in_single_precision_tasks_at_once_differ_from_separate_ones_by_rounding_alone(small_sam, own):
    torch.manual_seed(1)
    embedding = torch.randn(2, 3, 256, 4, 4) if own else torch.randn(2, 256, 4, 4)
    decoder = perturb(PromptDecoder(small_sam, tasks=3))
    singles = single_tasks(decoder, lambda: PromptDecoder(small_sam))
    with torch.no_grad():
        together = decoder(embedding)
        apart = torch.cat([single(embedding[:, t] if own else embedding) for t, single in enumerate(singles)], 1)
    torch.testing.assert_close(together, apart, atol=2e-6, rtol=0)


def test_a_single_task_takes_its_own_embedding_with_or_without_the_task_axis(small_sam, embedding):
    decoder = perturb(PromptDecoder(small_sam))
    with torch.no_grad():
        assert torch.equal(decoder(embedding[:, None]), decoder(embedding))


def test_the_gradient_of_one_task_does_not_reach_another(small_sam, embedding):
    decoder = perturb(PromptDecoder(small_sam, tasks=2))
    decoder(embedding)[:, 0].sum().backward()
    for p in (*decoder.lower_parameters(), *decoder.upper_parameters()):
        assert p.grad[0].any()
        assert not p.grad[1].any()


def test_embeddings_for_another_number_of_tasks_are_refused(small_sam):
    with pytest.raises(ValueError, match=r"\(1, 2, 256, 4, 4\) holds not one embedding for each of the 3 tasks"):
        PromptDecoder(small_sam, tasks=3)(torch.zeros(1, 2, 256, 4, 4))


def test_each_task_starts_from_its_own_seed(small_sam):
    mixed = PromptDecoder(small_sam, tasks=3, head="two_token", seed=[3, 5, 3]).adapter_state()
    alone = PromptDecoder(small_sam, head="two_token", seed=5).adapter_state()
    assert all(torch.equal(value[1], alone[name][0]) for name, value in mixed.items())
    assert all(torch.equal(value[0], value[2]) for value in mixed.values())
    assert not torch.equal(mixed["theta.mask_tokens"][0], mixed["theta.mask_tokens"][1])


def test_seeds_that_do_not_match_the_tasks_are_refused(small_sam):
    with pytest.raises(ValueError, match="2 seeds given for 3 tasks"):
        PromptDecoder(small_sam, tasks=3, seed=[0, 1])


def test_sparse_prompts_start_alike_whatever_the_seed(small_sam):
    """What is saved is the difference from the start, so the start may not depend on the seed."""
    starts = [TaskDecoder(small_sam, prompt="sparse:2", seed=seed).sparse_start for seed in (0, 7)]
    assert torch.equal(*starts)


# The two levels


@pytest.mark.parametrize(("prompt", "head"), KINDS)
def test_the_two_levels_are_disjoint_and_are_all_that_trains(small_sam, prompt, head):
    decoder = PromptDecoder(small_sam, tasks=2, prompt=prompt, head=head)
    lower, upper = {id(p) for p in decoder.lower_parameters()}, {id(p) for p in decoder.upper_parameters()}
    assert not lower & upper
    assert lower | upper == {id(p) for p in decoder.parameters() if p.requires_grad}


@pytest.mark.parametrize(("prompt", "head"), KINDS)
def test_every_trainable_tensor_gets_a_gradient(small_sam, embedding, prompt, head):
    decoder = perturb(PromptDecoder(small_sam, prompt=prompt, head=head))
    decoder(embedding).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in decoder.parameters() if p.requires_grad)


def test_the_iou_head_is_not_in_the_decoder(small_sam):
    names = [name for name, _ in PromptDecoder(small_sam).named_parameters()]
    assert len(small_sam.mask_decoder.iou_prediction_head.state_dict()) == 6
    assert not [name for name in names if "iou" in name]


@pytest.mark.parametrize(
    ("head", "theta"), [("sam", 23_552 + 73_952 + 139_808 + 256), ("two_token", 23_552 + 73_952 + 279_616 + 2 * 256)]
)
def test_the_lower_level_has_the_papers_number_of_parameters(small_sam, head, theta):
    # Low-rank factors, upscaling, hyper-network(s), mask token(s); the same for every SAM with 256 channels.
    assert count(PromptDecoder(small_sam, head=head).lower_parameters()) == theta


@pytest.mark.parametrize(("prompt", "vectors"), [("dense", 1), ("sparse:1", 1), ("sparse:4", 4), ("both:4", 5)])
def test_the_upper_level_is_one_vector_of_256_for_each_prompt(small_sam, prompt, vectors):
    assert count(PromptDecoder(small_sam, tasks=2, prompt=prompt).upper_parameters()) == 2 * vectors * 256


def test_weight_decay_pulls_the_prompt_to_sams_no_mask_embedding(small_sam):
    decoder = perturb(PromptDecoder(small_sam))
    start = small_sam.prompt_encoder.no_mask_embed.weight.detach()
    before = decoder.merge(small_sam)["prompt_encoder.no_mask_embed.weight"] - start
    optimizer = torch.optim.AdamW(decoder.upper_parameters(), lr=0.1, weight_decay=0.5)
    for p in decoder.upper_parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = decoder.merge(small_sam)["prompt_encoder.no_mask_embed.weight"] - start
    torch.testing.assert_close(after, (1 - 0.1 * 0.5) * before, atol=1e-6, rtol=0)


# Refusals


@pytest.mark.parametrize("prompt", ["points", "sparse", "sparse:0", "both:-1", "both:x", "dense:2", ""])
def test_an_unknown_prompt_is_refused(small_sam, prompt):
    with pytest.raises(ValueError, match=rf"prompt: '{prompt}' is not dense, none, sparse:n or both:n"):
        TaskDecoder(small_sam, prompt=prompt)


def test_an_unknown_head_is_refused(small_sam):
    with pytest.raises(ValueError, match="head: 'three' is not one of sam, two_token"):
        TaskDecoder(small_sam, head="three")


def test_a_rank_of_zero_is_refused(small_sam):
    with pytest.raises(ValueError, match="lora_rank: 0 must be at least 1"):
        TaskDecoder(small_sam, lora_rank=0)


def test_no_task_at_all_is_refused(small_sam):
    with pytest.raises(ValueError, match="0 tasks"):
        PromptDecoder(small_sam, tasks=0)


# Adapter tensors


def test_adapters_of_another_head_are_refused_with_what_differs(small_sam):
    state = PromptDecoder(small_sam, head="two_token").adapter_state()
    with pytest.raises(ValueError, match=r"hypernetworks\.1\.layers\.0\.bias"):
        PromptDecoder(small_sam).load_adapter_state(state)


def test_adapters_for_another_number_of_tasks_are_refused_and_nothing_is_taken(small_sam):
    decoder, other = PromptDecoder(small_sam), perturb(PromptDecoder(small_sam, tasks=2))
    before = {name: value.clone() for name, value in decoder.adapter_state().items()}
    with pytest.raises(ValueError, match=r"has shape \(2, .*\), not \(1, "):
        decoder.load_adapter_state(other.adapter_state())
    assert all(torch.equal(value, before[name]) for name, value in decoder.adapter_state().items())


# Merging


def test_merging_changes_neither_the_sam_nor_the_decoder(small_sam, embedding):
    decoder = perturb(PromptDecoder(small_sam, tasks=2))
    with torch.no_grad():
        before = decoder(embedding)
        for value in decoder.merge(small_sam, 1).values():
            value.zero_()
        assert torch.equal(decoder(embedding), before)
    assert small_sam.mask_decoder.mask_tokens.weight.any()


def test_merging_changes_only_what_was_trained(small_sam):
    own = small_sam.state_dict()
    merged = perturb(PromptDecoder(small_sam)).merge(small_sam)
    changed = {name for name, value in merged.items() if not torch.equal(value, own[name])}
    trained = (
        "mask_decoder.transformer.",
        "mask_decoder.output_upscaling.",
        "mask_decoder.output_hypernetworks_mlps.0.",
        "mask_decoder.mask_tokens.",
        "prompt_encoder.no_mask_embed.",
    )
    assert len(changed) == 14 + 6 + 6 + 1 + 1  # q and v weights, upscaling, one hyper-network, tokens, prompt
    assert all(name.startswith(trained) for name in changed)


@pytest.mark.parametrize(("prompt", "head"), KINDS[1:])
def test_what_has_no_place_in_a_plain_sam_is_not_merged(small_sam, prompt, head):
    with pytest.raises(ValueError, match="only head=sam with prompt=dense fits a plain SAM"):
        PromptDecoder(small_sam, prompt=prompt, head=head).merge(small_sam)


@pytest.mark.parametrize("task", [-1, 2])
def test_merging_a_task_that_does_not_exist_is_refused(small_sam, task):
    with pytest.raises(ValueError, match=rf"task {task} does not exist; there are 2"):
        PromptDecoder(small_sam, tasks=2).merge(small_sam, task)


# What trains of the transformer

HEAD = {"sam": 1 + 6 + 6, "two_token": 1 + 12 + 6}  # tensors: tokens, hyper-networks, upscaling
# Of SAM's transformer: two layers of three attentions (four linear layers each), an MLP of two and four norms; a last
# attention and its norm.
LINEAR, NORMS, ATTENTIONS = 2 * (3 * 4 + 2) + 4, 2 * 4 + 1, 7
TRAINED_TENSORS = {
    "lora": 2 * 2 * ATTENTIONS,
    "gated": 2 * 2 * ATTENTIONS,
    "bitfit": LINEAR + NORMS,
    "affine_norm": 2 * NORMS,
    "full": 2 * (LINEAR + NORMS),
}
MORE_KINDS = [
    {"train_decoder": "gated", "lora_rank": 3},
    {"train_decoder": "bitfit"},
    {"train_decoder": "affine_norm"},
    {"train_decoder": "full", "head": "two_token"},
    {"train_decoder": "frozen"},
    {"mask_prompt": True},
    {"train_decoder": "gated", "lora_rank": 2, "head": "two_token", "mask_prompt": True, "prompt": "both:2"},
]


def trained_of_the_transformer(decoder: PromptDecoder) -> set[str]:
    prefix = "theta.transformer."
    return {name.removeprefix(prefix) for name in decoder.adapter_state() if name.startswith(prefix)}


@pytest.mark.parametrize("head", HEAD)
@pytest.mark.parametrize("kind", TRAINED_TENSORS)
def test_so_many_tensors_of_transformer_and_head_train(small_sam, kind, head):
    decoder = PromptDecoder(small_sam, train_decoder=kind, head=head)
    assert len(trained_of_the_transformer(decoder)) == TRAINED_TENSORS[kind]
    assert len(decoder.lower_parameters()) == TRAINED_TENSORS[kind] + HEAD[head]


def test_bitfit_trains_every_bias_of_sams_transformer(small_sam):
    transformer = small_sam.mask_decoder.transformer
    biases = {name for name, _ in transformer.named_parameters() if name.endswith("bias")}
    assert trained_of_the_transformer(PromptDecoder(small_sam, train_decoder="bitfit")) == biases


def test_affine_norm_trains_every_layer_norm_of_sams_transformer(small_sam):
    modules = small_sam.mask_decoder.transformer.named_modules()
    norms = {f"{name}.{p}" for name, m in modules if isinstance(m, nn.LayerNorm) for p in ("weight", "bias")}
    assert trained_of_the_transformer(PromptDecoder(small_sam, train_decoder="affine_norm")) == norms


def test_full_trains_all_of_sams_transformer(small_sam):
    everything = {name for name, _ in small_sam.mask_decoder.transformer.named_parameters()}
    assert trained_of_the_transformer(PromptDecoder(small_sam, train_decoder="full")) == everything


def test_frozen_trains_the_prompt_alone(small_sam):
    assert sorted(PromptDecoder(small_sam, train_decoder="frozen").adapter_state()) == ["phi.dense_prompt"]


def test_gates_are_of_the_upper_level_and_start_at_one(small_sam):
    decoder = PromptDecoder(small_sam, train_decoder="gated", lora_rank=3, tasks=2)
    gates = {name: value for name, value in decoder.adapter_state().items() if name.endswith(".gate")}
    assert len(gates) == 2 * ATTENTIONS
    assert all(name.startswith("phi.") for name in gates)
    assert all(torch.equal(value, torch.ones(2, 3)) for value in gates.values())


def test_a_mask_prompt_trains_sams_mask_convolutions(small_sam):
    names = PromptDecoder(small_sam, train_decoder="frozen", mask_prompt=True).adapter_state()
    convolutions = small_sam.prompt_encoder.mask_downscaling.state_dict()
    assert {n.removeprefix("theta.mask_convolutions.") for n in names if n.startswith("theta.")} == set(convolutions)


def test_no_prompt_leaves_nothing_to_the_upper_level(small_sam, embedding):
    decoder = PromptDecoder(small_sam, prompt="none")
    assert decoder.upper_parameters() == []
    with torch.no_grad():
        assert torch.equal(decoder(embedding), PromptDecoder(small_sam)(embedding))


def test_an_unknown_part_to_train_is_refused(small_sam):
    with pytest.raises(ValueError, match=r"train_decoder: 'all' is not one of lora, gated, .*, frozen, linear_probe"):
        TaskDecoder(small_sam, train_decoder="all")


@pytest.mark.parametrize("options", MORE_KINDS, ids=lambda options: "-".join(map(str, options.values())))
def test_two_tasks_at_once_equal_two_separate_decoders_whatever_trains(small_sam, embedding, options):
    decoder = perturb(PromptDecoder(small_sam, tasks=2, **options)).double()
    singles = single_tasks(decoder, lambda: PromptDecoder(small_sam, **options).double())
    with torch.no_grad():
        together = decoder(embedding.double())
        apart = torch.cat([single(embedding.double()) for single in singles], 1)
    assert not torch.equal(together[:, 0], together[:, 1])
    torch.testing.assert_close(together, apart, atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", MORE_KINDS, ids=lambda options: "-".join(map(str, options.values())))
def test_whatever_trains_gets_a_gradient(small_sam, embedding, options):
    decoder = perturb(PromptDecoder(small_sam, **options))
    decoder(embedding).square().sum().backward()
    trained = (*decoder.lower_parameters(), *decoder.upper_parameters())
    without = {id(p) for p in trained if p.grad is None or not p.grad.any()}
    # Every key of an attention gets the same product with the key's bias, which the softmax takes out.
    names = {name for name, p in decoder.named_parameters() if id(p) in without}
    assert all(name.endswith("k_proj/bias") for name in names)


def test_a_mask_prompt_is_sams_second_pass_with_its_own_first_mask(small_sam, embedding):
    """By SAM's own parts; the embedded mask takes the place of the no-mask vector."""
    decoder = PromptDecoder(small_sam, prompt="none", mask_prompt=True)
    start = small_sam.prompt_encoder.no_mask_embed.weight[0]
    with torch.no_grad():
        first = sam_logits(small_sam, embedding, torch.empty(0, 256), start)[:, :1]
        dense = small_sam.prompt_encoder.mask_downscaling(first)
        expected = small_sam.mask_decoder.predict_masks(
            image_embeddings=embedding[:1],
            image_pe=small_sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=torch.empty(1, 0, 256),
            dense_prompt_embeddings=dense,
        )[0][:, 0]
        found = decoder(embedding)[:1, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# Gates, exported


def with_zero_gates(sam) -> PromptDecoder:
    """Three tasks of rank 4: by name, layer i has i % (t + 2) gates left in task t, in any places; layer 0 has none."""
    decoder = perturb(PromptDecoder(sam, tasks=3, train_decoder="gated", lora_rank=4))
    generator = torch.Generator().manual_seed(1)
    gates = sorted((name, p) for name, p in decoder.phi.items() if name.endswith("gate"))
    for i, (_, gate) in enumerate(gates):
        for t in range(3):
            closed = torch.randperm(4, generator=generator)[i % (t + 2) :]
            gate.data[t, closed] = 0
    return decoder


def exported(sam, decoder: PromptDecoder) -> tuple[PromptDecoder, dict]:
    """The decoder that takes what is kept of another, and the settings that changed."""
    state, changed = decoder.exported(decoder.adapter_state())
    options = {key: value for key, value in changed.items() if key != "effective_ranks"}
    plain = PromptDecoder(sam, tasks=decoder.tasks, **options).to(decoder.theta["mask_tokens"].dtype)
    plain.load_adapter_state(state)
    return plain, changed


def test_what_is_kept_of_gates_computes_the_same_without_them(small_sam, embedding):
    decoder = with_zero_gates(small_sam).double()
    plain, _ = exported(small_sam, decoder)
    assert not [name for name in plain.adapter_state() if name.endswith("gate")]
    with torch.no_grad():
        torch.testing.assert_close(plain(embedding.double()), decoder(embedding.double()), atol=1e-12, rtol=0)


def test_effective_ranks_count_the_gates_left_of_each_task_and_a_layer_has_the_most_of_any(small_sam):
    _, changed = exported(small_sam, with_zero_gates(small_sam))
    modules = small_sam.mask_decoder.transformer.named_modules()
    layers = [f"transformer.{name}" for name, _ in modules if name.endswith(("q_proj", "v_proj"))]
    left = {layer: [i % 2, i % 3, i % 4] for i, layer in enumerate(sorted(layers))}
    assert changed["effective_ranks"] == left
    assert changed["lora_rank"] == [max(left[layer]) for layer in layers]
    assert changed["train_decoder"] == "lora"


def test_gates_that_are_all_closed_leave_sams_transformer(small_sam):
    decoder = PromptDecoder(small_sam, train_decoder="gated", lora_rank=2)
    for name, p in decoder.phi.items():
        if name.endswith("gate"):
            p.data.zero_()
    plain, changed = exported(small_sam, decoder)
    assert changed["lora_rank"] == [0] * 14
    assert trained_of_the_transformer(plain) == set()


def test_what_has_no_gates_is_kept_as_it_is(small_sam):
    decoder = PromptDecoder(small_sam)
    state = decoder.adapter_state()
    assert decoder.exported(state) == (state, {})


@pytest.mark.parametrize("kind", ["gated", "bitfit", "affine_norm", "full"])
def test_a_merged_task_computes_the_same_whatever_was_trained(small_sam, embedding, kind):
    decoder = perturb(PromptDecoder(small_sam, train_decoder=kind))
    merged = copy.deepcopy(small_sam)
    merged.load_state_dict(decoder.merge(small_sam), strict=True)
    start = merged.prompt_encoder.no_mask_embed.weight[0]
    with torch.no_grad():
        expected = sam_logits(merged, embedding, torch.empty(0, 256), start)[:, 0]
        found = decoder(embedding)[:1, 0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
