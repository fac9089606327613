"""Criteria: equal to a reference library or to their paper's rule, finite everywhere, folded without a trace."""

import math

import pytest
import timm
import torch
from processes import run_processes
from pytorch_metric_learning import losses
from torch import nn
from torch.nn import functional

import timm_mfd
from timm_mfd import MFDClassificationTask, MFDLoss
from timm_mfd.criteria import (
    AMSoftmaxLoss,
    ArcFaceLoss,
    CenterLoss,
    cosines_of,
    create_criterion,
    fold_classifier,
)

K, D, B = 7, 12, 40


def random_batch(dtype=torch.float32):
    torch.manual_seed(3)
    weight = torch.randn(K, D, dtype=dtype)
    embedding = torch.randn(B, D, dtype=dtype)
    target = torch.arange(B) % K
    # Embeddings near their class, at right angles, and nearly opposite (where ArcFace continues beyond pi).
    embedding[:5] = 3 * weight[target[:5]] + 0.02 * embedding[:5]
    embedding[5:10] = -2 * weight[target[5:10]] + 0.1 * embedding[5:10]
    return embedding.requires_grad_(), weight.requires_grad_(), target


@pytest.mark.parametrize("scale", [8.0, 30.0])
@pytest.mark.parametrize(
    ("ours", "reference"),
    [
        (lambda s: AMSoftmaxLoss(scale=s), lambda s: losses.CosFaceLoss(K, D, margin=0.35, scale=s)),
        (lambda s: ArcFaceLoss(scale=s), lambda s: losses.ArcFaceLoss(K, D, margin=math.degrees(0.5), scale=s)),
    ],
)
def test_margin_losses_and_gradients_equal_pytorch_metric_learning(ours, reference, scale):
    embedding, weight, target = random_batch()
    loss = ours(scale)(cosines_of(embedding, weight), target)
    gradients = torch.autograd.grad(loss, (embedding, weight))

    theirs = reference(scale)
    theirs.W.data = weight.detach().T.clone()
    other = embedding.detach().clone().requires_grad_()
    expected = theirs(other, target)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], other.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[1], theirs.W.grad.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("criterion", [AMSoftmaxLoss(), ArcFaceLoss(), ArcFaceLoss(margin=3.0)])
def test_margin_losses_equal_their_formula_in_loops(criterion):
    embedding, weight, target = random_batch(torch.float64)
    total = 0.0
    for x, y in zip(embedding.tolist(), target.tolist(), strict=True):
        exponents = []
        for j, w in enumerate(weight.tolist()):
            cos = sum(a * b for a, b in zip(x, w, strict=True)) / math.hypot(*x) / math.hypot(*w)
            if j == y:
                if isinstance(criterion, AMSoftmaxLoss):
                    cos = cos - 0.35
                elif math.acos(cos) + criterion.margin <= math.pi:
                    cos = math.cos(math.acos(cos) + criterion.margin)
                else:
                    cos = cos - criterion.margin * math.sin(criterion.margin)
            exponents.append(math.exp(30 * cos))
        total -= math.log(exponents[y] / sum(exponents))
    loss = criterion(cosines_of(embedding, weight), target)
    assert loss.item() == pytest.approx(total / B, rel=1e-9)


@pytest.mark.parametrize("criterion", [AMSoftmaxLoss(), ArcFaceLoss()])
def test_margin_losses_pass_gradcheck(criterion):
    embedding, weight, target = random_batch(torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: criterion(cosines_of(x, w), target), (embedding, weight))


@pytest.mark.parametrize("criterion", [AMSoftmaxLoss(), ArcFaceLoss(), ArcFaceLoss(scale=64.0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sign", [1, -1])
def test_margin_losses_are_finite_where_the_angle_is_0_or_pi(criterion, dtype, sign):
    weight = torch.eye(3, dtype=dtype).requires_grad_()
    embedding = (sign * torch.tensor([[1e-3, 0, 0], [0, 5, 0], [0, 0, 3e4], [0, 0, 0]], dtype=dtype)).requires_grad_()
    target = torch.tensor([0, 1, 2, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        cosines = cosines_of(embedding, weight)
        loss = criterion(cosines, target)
    assert cosines.dtype == loss.dtype == torch.float32
    assert cosines[:3].diagonal().tolist() == [sign] * 3  # exactly the case that this test is about
    loss.backward()
    assert loss.isfinite()
    assert embedding.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_a_margin_of_zero_is_softmax_of_scaled_cosines():
    embedding, weight, target = random_batch()
    cosines = cosines_of(embedding, weight)
    expected = functional.cross_entropy(5 * cosines, target)
    for criterion in (AMSoftmaxLoss(0, 5), ArcFaceLoss(0, 5)):
        torch.testing.assert_close(criterion(cosines, target), expected)


def test_arcface_loss_grows_with_the_angle_up_to_pi():
    angles = torch.linspace(0, math.pi, 200, dtype=torch.float64)
    values = ArcFaceLoss().harder(angles.cos())
    assert (values.diff() < 0).all()


def test_center_loss_equals_its_papers_rule_on_a_case_done_by_hand():
    """Three images of classes 0, 0 and 2 in the plane; centres (1, 0), (5, 5) and (0, 2); lambda 0.1, alpha 0.5."""
    criterion = CenterLoss(3, 2, weight=0.1, rate=0.5)
    criterion.centres.copy_(torch.tensor([[1.0, 0.0], [5.0, 5.0], [0.0, 2.0]]))
    embedding = torch.tensor([[3.0, 0.0], [1.0, 4.0], [0.0, 0.0]], requires_grad=True)
    logits = torch.zeros(3, 3)
    loss = criterion(logits, torch.tensor([0, 0, 2]), embedding)
    # Squared distances 4, 16 and 4; their half sum is L_C = 12 for the batch, 4 for an image of it.
    assert loss.item() == pytest.approx(math.log(3) + 0.1 * 4)
    loss.backward()
    # The paper's dL_C/dx_i = x_i - c_{y_i}, times lambda, for the mean over three images.
    torch.testing.assert_close(embedding.grad, 0.1 / 3 * torch.tensor([[2.0, 0.0], [0.0, 4.0], [0.0, -2.0]]))
    # delta c_0 = ((1,0)-(3,0) + (1,0)-(1,4)) / (1 + 2) = (-2/3, -4/3); delta c_2 = ((0,2)-(0,0)) / (1 + 1) = (0, 1).
    expected = torch.tensor([[1 + 1 / 3, 2 / 3], [5.0, 5.0], [0.0, 1.5]])
    torch.testing.assert_close(criterion.centres, expected)
    criterion.eval()(logits, torch.tensor([0, 0, 2]), embedding)
    torch.testing.assert_close(criterion.centres, expected)  # an evaluation leaves the centres alone


def test_center_loss_is_finite_in_half_precision():
    criterion = CenterLoss(2, 3)
    embedding = torch.full((2, 3), 6e4, dtype=torch.float16, requires_grad=True)  # its square is no float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(torch.zeros(2, 2, dtype=torch.float16), torch.tensor([0, 1]), embedding)
    loss.backward()
    assert loss.isfinite()
    assert embedding.grad.isfinite().all()
    assert criterion.centres.isfinite().all()
    assert criterion.centres.dtype == torch.float32


def _centres_of_a_part(rank, processes):
    torch.manual_seed(0)
    embedding, target = torch.randn(12, 4), torch.tensor([0, 1, 2, 0] * 3)
    criterion = CenterLoss(4, 4)
    for batch in range(3):
        x = embedding[4 * batch + rank :: processes][: 4 // processes]
        y = target[4 * batch + rank :: processes][: 4 // processes]
        criterion(torch.zeros(len(x), 4), y, x)
    return criterion.centres


def test_centres_of_two_processes_are_those_of_one(tmp_path):
    first, second = run_processes(_centres_of_a_part, 2, tmp_path)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, _centres_of_a_part(0, 1))
    assert (first[:3] != 0).all()
    assert (first[3] == 0).all()  # no image of class 3


def trained_task(criterion, architecture="test_resnet", steps=3, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=5)
    task = MFDClassificationTask(model, create_criterion(criterion, model, **kwargs), MFDLoss(0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(steps):
        loss = task(torch.randn(10, 3, 64, 64), torch.arange(10) % 5)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return task


@pytest.mark.parametrize("criterion", ["am_softmax", "arcface"])
def test_a_folded_model_saved_and_loaded_by_timm_answers_as_the_training_head(tmp_path, criterion):
    task = trained_task(criterion).eval()
    images = torch.randn(200, 3, 64, 64)
    with torch.no_grad():
        # Rows that tell the images apart, of very different lengths, so that the plain product would answer otherwise.
        weight = task.model.get_classifier().weight
        mean = functional.normalize(timm_mfd.forward_stages(task.model, images).embedding.mean(0), dim=0)
        weight -= (weight @ mean)[:, None] * mean
        weight *= torch.tensor([1.0, 9.0, 0.1, 3.0, 0.5])[:, None]
    timm_mfd.save_pretrained(task.get_eval_model(), tmp_path / "model")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    with torch.no_grad():
        trained = task(images, torch.zeros(200, dtype=torch.long))["output"]
        assert torch.equal(loaded(images).argmax(1), trained.argmax(1))
        assert len(trained.argmax(1).unique()) > 2
        assert not torch.equal(task.model(images).argmax(1), trained.argmax(1))
    classifier = loaded.get_classifier()
    torch.testing.assert_close(classifier.weight.norm(dim=1), torch.ones(5))
    assert (classifier.bias == 0).all()


def test_the_output_is_without_margin():
    torch.manual_seed(0)
    task = trained_task("arcface", steps=0).eval()
    images, target = torch.randn(6, 3, 64, 64), torch.arange(6) % 5
    out = task(images, target)
    staged = timm_mfd.forward_stages(task.model, images)
    torch.testing.assert_close(out["output"], cosines_of(staged.embedding, task.model.get_classifier().weight))
    assert out["criterion_loss"] > functional.cross_entropy(30 * out["output"], target)  # the margin is in the loss


def test_folding_shares_all_weights_but_the_classifier_and_leaves_the_model_alone():
    task = trained_task("arcface")
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    task.train()
    folded = task.get_eval_model().eval()
    assert type(folded) is type(task.model)
    assert task.model.training
    own = dict(task.model.state_dict(keep_vars=True))
    different = {name for name, t in folded.state_dict(keep_vars=True).items() if t is not own[name]}
    assert different == {"fc.weight", "fc.bias"}
    assert all(torch.equal(before[name], tensor) for name, tensor in task.model.state_dict().items())


@pytest.mark.parametrize("architecture", ["test_convnext", "test_efficientnet", "test_vit", "resnet18_mfd"])
def test_margin_losses_train_other_architectures(architecture):
    kwargs = {"img_size": 64} if "vit" in architecture else {}
    torch.manual_seed(0)
    model = timm_mfd.create_model(architecture, num_classes=5, **kwargs)
    task = MFDClassificationTask(model, create_criterion("arcface", model))
    task(torch.randn(4, 3, 64, 64), torch.arange(4))["loss"].backward()
    without = [n for n, p in model.named_parameters() if p.grad is None and p.requires_grad]
    assert without == []  # DDP would wait for them


@pytest.mark.parametrize("criterion", ["center", "am_softmax", "arcface"])
@pytest.mark.parametrize("ema", [False, True])
def test_checkpoint_state_holds_what_training_needs(criterion, ema):
    task = trained_task(criterion)
    if ema:
        task.setup_ema(decay=0.5)
    states = task.get_checkpoint_state(), task.get_checkpoint_state(ema=True) if ema else {}
    other = trained_task(criterion, steps=1)
    if ema:
        other.setup_ema(decay=0.5)
        other.load_checkpoint_state(states[1]["state_dict_ema"], states[1].get("task_state_ema"), ema=True)
    other.load_checkpoint_state(states[0]["state_dict"], states[0].get("task_state"))
    for part in ("trainable_module", "criterion") + ("trainable_module_ema",) * ema:
        expected, found = (getattr(t, part).state_dict() for t in (task, other))
        assert all(torch.equal(expected[name], found[name]) for name in expected | found), part


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("arcfase", {}, "unknown criterion 'arcfase'; choose one of softmax, center, am_softmax, arcface"),
        ("softmax", {"margin": 0.3}, "margin 0.3 does not apply to the criterion 'softmax'"),
        ("arcface", {"label_smoothing": 0.1}, "label smoothing 0.1 does not apply to the criterion 'arcface'"),
        ("arcface", {"center_weight": 0.1}, "center weight 0.1 does not apply to the criterion 'arcface'"),
        ("center", {"scale": 3.0}, "scale 3.0 does not apply to the criterion 'center'"),
        ("arcface", {"margin": 4.0}, "an angle up to pi, not 4.0"),
        ("am_softmax", {"margin": -1.0}, "margin must be a finite number from 0, not -1.0"),
        ("am_softmax", {"scale": 0.0}, "scale must be a finite number above 0, not 0.0"),
        ("center", {"center_weight": math.nan}, "weight must be a finite number from 0, not nan"),
        ("softmax", {"label_smoothing": 1.0}, r"label smoothing must be in \[0, 1\), not 1.0"),
    ],
)
def test_wrong_criteria_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        create_criterion(name, timm.create_model("test_resnet", num_classes=5), **arguments)


def test_defaults_are_the_papers():
    model = timm.create_model("test_resnet", num_classes=5)
    assert repr(create_criterion("am_softmax", model)) == "AMSoftmaxLoss(margin=0.35, scale=30.0)"
    assert repr(create_criterion("arcface", model)) == "ArcFaceLoss(margin=0.5, scale=30.0)"
    center = create_criterion("center", model)
    assert repr(center) == "CenterLoss(weight=0.003, rate=0.5)"
    assert center.centres.shape == (5, model.get_classifier().in_features)
    assert repr(create_criterion("softmax", model, label_smoothing=0.1)) == repr(nn.CrossEntropyLoss())
    assert create_criterion("softmax", model, label_smoothing=0.1).label_smoothing == 0.1


def test_a_model_without_one_embedding_is_refused():
    model = timm.create_model("test_resnet", num_classes=5, drop_rate=0.2)
    with pytest.raises(ValueError, match="ArcFaceLoss needs a model whose classifier is one linear layer .* ResNet"):
        MFDClassificationTask(model, ArcFaceLoss())
    with pytest.raises(ValueError, match="needs a model whose classifier"):
        MFDClassificationTask(timm.create_model("test_resnet", num_classes=5, drop_rate=0.2), CenterLoss(5, 96))
    with pytest.raises(ValueError, match=r"takes class indices \[B\]"):
        ArcFaceLoss()(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="is a Identity, not one nn.Linear"):
        fold_classifier(timm.create_model("test_resnet", num_classes=0))
