"""How the demo enumerates: an image on each core, none mistaken for another."""

import threading

import torch

from hf_shapley.jobs import demo


def test_every_core_enumerates_an_image_of_its_own(monkeypatch):
    """As many images as cores are under way at once, each on one thread; their values come in the images' order."""
    together = threading.Barrier(3, timeout=60)
    threads = []

    def slow(model, image):
        together.wait()
        threads.append(torch.get_num_threads())
        return image * model

    monkeypatch.setattr(demo, "_cores", lambda: 3)
    monkeypatch.setattr(demo, "_exact", slow)
    before = torch.get_num_threads()
    values = demo._exact_values(2, torch.arange(6.0))
    assert values.tolist() == [0, 2, 4, 6, 8, 10]
    assert threads == [1] * 6
    assert torch.get_num_threads() == before
