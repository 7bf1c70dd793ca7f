import copy

import pytest
import torch

from calib.judge import first_order
from calib.judge.choice import output_terms
from calib.judge.first_order import PROJECTIONS, by_image, noise_by_image, output_gradients
from tests.tiny import TINY, tiny_batches, tiny_model


@pytest.mark.parametrize("family", sorted(TINY))
def test_the_gradient_foretells_what_a_small_error_does(family):
    model = tiny_model(family)
    net, x = model.net.double(), tiny_batches(1)[0].double()
    layers = model.layers
    for which in (0, len(layers) // 2, len(layers) - 1):
        layer, parts = layers[which], []
        for inputs, gradients, *_ in output_gradients(net, layers, x):
            error = 1e-8 * torch.randn(inputs[layer].shape, dtype=torch.float64)
            parts.append((error, (gradients[layer] * error).flatten(2).sum(2)))
        error, foretold = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], 1)
        exact = net(x).detach()
        hook = net.get_submodule(layer).register_forward_pre_hook(lambda _m, read, e=error: (read[0] + e,))
        change = net(x).detach() - exact
        hook.remove()
        generator = torch.Generator().manual_seed(0)
        for start in range(0, len(x), first_order.BATCH):
            rows = change[start : start + first_order.BATCH]
            vectors = torch.randn(PROJECTIONS, *rows.shape, generator=generator).double()
            for k, vector in enumerate(vectors):
                expected = (vector * rows).flatten(1).sum(1)
                torch.testing.assert_close(
                    foretold[k, start : start + len(rows)], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
                )


def test_on_average_the_square_is_the_noise_of_the_output():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    x, error = torch.randn(2000, 5), torch.randn(2000, 5)
    squares = torch.cat(
        [
            (gradients["0"] * error[2 * index : 2 * index + 2]).sum(2).square().mean(0)
            for index, (_, gradients, *_) in enumerate(output_gradients(net, ("0",), x))
        ]
    )
    exact = (net(x + error) - net(x)).detach().square().sum()
    assert float(squares.sum() / exact) == pytest.approx(1, abs=0.1)  # 8000 samples


def means_of(net, layers):
    torch.manual_seed(0)
    modules = {name: net.get_submodule(name) for name in layers}
    return {
        name: torch.randn(layer.in_channels if isinstance(layer, torch.nn.Conv2d) else layer.in_features)
        for name, layer in modules.items()
    }


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("family", sorted(TINY))
def test_gradients_of_weights_are_those_of_every_image_alone(family, centred):
    net, images, layers = tiny_model(family).net, tiny_batches(1)[0][:2], tiny_model(family).layers
    means = {name: mean * centred for name, mean in means_of(net, layers).items()}
    found = [seen.weights for seen in output_gradients(net, layers, images, weights_around=means)]
    generator = torch.Generator().manual_seed(0)
    shifts = {name: torch.zeros(len(net.get_submodule(name).weight), requires_grad=True) for name in layers}

    def shifted(name):
        return lambda _m, _x, y: y + (shifts[name][:, None, None] if y.ndim == 4 else shifts[name])

    hooks = [net.get_submodule(name).register_forward_hook(shifted(name)) for name in layers]
    weights = [net.get_submodule(name).weight.requires_grad_() for name in layers]
    for image, squares in zip(images, found, strict=True):
        output = net(image[None])
        expected = [torch.zeros_like(weight) for weight in weights]
        for vector in torch.randn(PROJECTIONS, *output.shape, generator=generator):
            dot = (output * vector).sum()
            gradients = torch.autograd.grad(dot, weights, retain_graph=True)
            offsets = torch.autograd.grad(dot, list(shifts.values()), retain_graph=True)
            for index, (name, gradient, offset) in enumerate(zip(layers, gradients, offsets, strict=True)):
                layer = net.get_submodule(name)
                # a mean on all taps adds its share of the output's gradient to each of them
                per_group = means[name].reshape(getattr(layer, "groups", 1), -1)
                rows = per_group.repeat_interleave(len(offset) // len(per_group), 0)
                of_mean = (offset[:, None] * rows).reshape(*rows.shape[:1], -1, *[1] * (gradient.ndim - 2))
                expected[index] += (gradient - of_mean) ** 2
        for name, total in zip(layers, expected, strict=True):
            torch.testing.assert_close(squares[name], total.detach(), rtol=1e-4, atol=1e-6 * float(total.max()))
    for hook in hooks:
        hook.remove()


def test_a_centred_weight_reads_its_input_less_the_mean():
    torch.manual_seed(0)
    first, mean, x = torch.nn.Linear(6, 4), torch.randn(6), torch.randn(1, 5, 6)
    net, lower = (
        torch.nn.Sequential(first, torch.nn.GELU()),
        torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.GELU()),
    )
    with torch.no_grad():
        lower[0].weight.copy_(first.weight)
        lower[0].bias.copy_(first.bias + first.weight @ mean)
    (found,) = output_gradients(net, ["0"], x, weights_around={"0": mean})
    (expected,) = output_gradients(lower, ["0"], x - mean, weights_around={"0": torch.zeros(6)})
    torch.testing.assert_close(found.weights["0"], expected.weights["0"], rtol=1e-4, atol=1e-6)


def test_no_hook_and_no_gradient_stays():
    model = tiny_model("vit")
    layers = model.layers
    wanted = [parameter.requires_grad for parameter in model.net.parameters()]
    list(output_gradients(model.net, layers, tiny_batches(1)[0], weights_around=means_of(model.net, layers)))
    assert [parameter.requires_grad for parameter in model.net.parameters()] == wanted
    assert all(not module._forward_pre_hooks for module in model.net.modules())
    assert all(parameter.grad is None for parameter in model.net.parameters())


class Windows(torch.nn.Module):
    """A layer on tokens (B, 6, 4): as they are, in windows of 3 of them, or with the tokens first."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.layer = how, torch.nn.Linear(4, 5)

    def forward(self, x):
        if self.how == "windows":
            return self.layer(x.reshape(-1, 3, 4)).reshape(-1, 6, 5)
        if self.how == "first":
            return self.layer(x.transpose(0, 1)).transpose(0, 1)
        return self.layer(x)


@pytest.mark.parametrize(("how", "images"), [("windows", 2), ("windows", 1), ("first", 5)])
def test_images_are_told_apart_in_windows_and_where_tokens_come_first(how, images, monkeypatch):
    monkeypatch.setattr(first_order, "BATCH", images)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, 6, 4, generator=generator)

    def found(how):
        net = Windows(how)
        (seen,) = output_gradients(net, ["layer"], x)
        noise = noise_by_image(seen.gradients["layer"], seen.inputs["layer"].square(), seen.images)
        change = lambda _name, read, returned: returned * read.mean(-1, keepdim=True)  # noqa: E731
        return noise, output_terms(net, Windows(""), ["layer"], x, change, torch.Generator().manual_seed(0))

    for one, other in zip(found(how), found(""), strict=True):
        assert len(one) >= images
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_tensor_without_an_axis_of_images_is_refused():
    with pytest.raises(ValueError, match=r"no axis of a tensor \(3, 7\) is that of 2 images"):
        by_image(torch.ones(3, 7), 2)


class Calls(torch.nn.Module):
    """A layer that reads two tensors of different sizes: one module called twice, or two with the same numbers."""

    def __init__(self, layer, twice):
        super().__init__()
        self.one, self.other = layer, layer if twice else copy.deepcopy(layer)
        self.head = torch.nn.Linear(5, 3)

    def forward(self, x):
        first = self.one(x)
        axis = 1 if first.ndim == 4 else -1
        second = self.other(first.narrow(axis, 0, 4)[..., :2, :].sigmoid())  # the second call depends on the first
        if axis == 1:
            first, second = (y.flatten(2).mT for y in (first, second))
        return self.head(torch.cat([first, second], 1).tanh())


@pytest.mark.parametrize(
    ("layer", "x"),
    [(lambda: torch.nn.Linear(4, 5), (2, 6, 4)), (lambda: torch.nn.Conv2d(4, 5, 3, 1, 1), (2, 4, 5, 6))],
    ids=["linear", "conv"],
)
def test_calls_of_one_layer_are_added_up_before_the_square(layer, x):
    torch.manual_seed(0)
    twice = Calls(layer(), twice=True).double()
    apart = Calls(twice.one, twice=False).double()
    apart.head = twice.head
    x = torch.randn(x, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (seen,) = output_gradients(twice, ["one"], x)
    (separate,) = output_gradients(apart, ["one", "other"], x)
    changes = [
        (separate.gradients[name] * separate.inputs[name].square()).flatten(2).sum(2) for name in ("one", "other")
    ]
    found = noise_by_image(seen.gradients["one"], seen.inputs["one"].square(), seen.images)
    torch.testing.assert_close(found, sum(changes).square().sum(0))
    channels = 1 if x.ndim == 4 else -1
    largest = [separate.inputs[name].movedim(channels, -1).reshape(-1, 4).amax(0) for name in ("one", "other")]
    assert torch.equal(seen.inputs["one"].movedim(channels, -1).reshape(-1, 4).amax(0), torch.maximum(*largest))

    def change(_name, _read, returned):
        return 0.1 * returned.square()

    terms = output_terms(twice, apart, ["one"], x, change, torch.Generator().manual_seed(0))
    separate_terms = output_terms(apart, apart, ["one", "other"], x, change, torch.Generator().manual_seed(0))
    torch.testing.assert_close(terms[:, 1], separate_terms[:, 1:].sum(1))


def test_weights_of_a_layer_that_is_called_twice_have_one_gradient():
    torch.manual_seed(0)
    net = Calls(torch.nn.Linear(4, 5), twice=True)
    x, mean = torch.randn(1, 6, 4), torch.randn(4)
    (seen,) = output_gradients(net, ["one"], x, weights_around={"one": mean})
    generator, expected = torch.Generator().manual_seed(0), 0.0
    # dr.y / dW of y = W (x - mean) + b' with b' = b + W mean held: what W alone does
    for vector in torch.randn(PROJECTIONS, *net(x).shape, generator=generator):
        weight = net.one.weight.detach().clone().requires_grad_()
        fixed = (net.one.bias + net.one.weight @ mean).detach()
        layer = lambda x, weight=weight, fixed=fixed: (x - mean) @ weight.T + fixed  # noqa: E731
        first = layer(x)
        y = net.head(torch.cat([first, layer(first[..., :2, :4].sigmoid())], 1).tanh())
        expected = expected + torch.autograd.grad((vector * y).sum(), weight)[0].square()
    torch.testing.assert_close(seen.weights["one"], expected, rtol=1e-4, atol=1e-6)


def test_a_network_that_keeps_a_tensor_of_its_last_run_can_be_copied_afterwards():
    class Keeps(torch.nn.Sequential):
        def forward(self, x):
            self.kept = self[0](x)
            return self[1](self.kept)

    net = Keeps(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).requires_grad_(False)
    for _ in output_gradients(net, ["0", "1"], torch.randn(3, 4)):
        pass
    assert copy.deepcopy(net).kept.shape == (1, 4)


class Choosing(torch.nn.Module):
    """The scores of one layer choose the tokens that another reads."""

    def __init__(self):
        super().__init__()
        self.scores, self.values = torch.nn.Linear(4, 1), torch.nn.Linear(4, 3)

    def forward(self, x):
        best = self.scores(x).squeeze(-1).topk(2, 1).indices
        return self.values(x.gather(1, best[..., None].expand(-1, -1, 4))).flatten(1)


def test_a_layer_that_only_chooses_costs_nothing_to_first_order():
    torch.manual_seed(0)
    net, x = Choosing().requires_grad_(False), torch.randn(3, 5, 4)
    layers = ["scores", "values"]
    for seen in output_gradients(net, layers, x, weights_around=dict.fromkeys(layers, torch.zeros(4))):
        assert not seen.gradients["scores"].any()
        assert not seen.weights["scores"].any()
        assert seen.gradients["values"].any()
    terms = output_terms(net, net, layers, x, lambda _n, _r, y: 0.1 * y, torch.Generator().manual_seed(0))
    assert not terms[:, 1].any()
    assert terms[:, 2].any()
