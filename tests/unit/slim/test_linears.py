from __future__ import annotations

from torch import nn

from viasd_calib.slim.linears import plain_linears


def test_another_layer_can_be_put_into_each_place() -> None:
    class Doubling(nn.Linear):
        """Computes something else."""

    inner = nn.ModuleDict({"up": nn.Linear(2, 3), "odd": Doubling(2, 2)})
    models = [nn.ModuleList([inner, nn.ReLU()]), nn.Sequential(nn.Linear(3, 1))]
    places = plain_linears(models)
    assert [(place.path, place.linear.out_features) for place in places] == [("0.up", 3), ("0", 1)]
    for place in places:
        place.put(nn.Identity())
    assert [type(inner["up"]), type(inner["odd"]), type(models[1][0])] == [nn.Identity, Doubling, nn.Identity]
    assert not plain_linears(models)
