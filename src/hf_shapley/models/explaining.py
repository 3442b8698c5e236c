"""What a Shapley classifier is asked when it does not learn: its game, maps, and how far they are to be trusted."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .checks import check_count, check_floats, check_pair
from .coalitions import check_coalitions, with_complements
from .evaluation_mode import evaluating
from .heads import mapped, weight_of
from .inputs import InputChecks
from .posterior import ShapleyPosterior, coalitions_to_ask, shapley_posterior


class ExplainingMixin(InputChecks):
    """`explain`, `check_explanation`, `coalition_values` and `game`."""

    # Names of the linear layers whose mean the logits are.
    classifier_names: tuple[str, ...] = ("classifier",)

    def classifiers(self) -> Sequence[nn.Module]:
        """The linear layer that classifies; or several, which share the readout evenly and give the mean."""
        return [self.get_submodule(name) for name in self.classifier_names]

    def classify(self, readouts: Tensor) -> Tensor:
        """Logits of readouts, (..., D') -> (..., K), float32."""
        layers = self.classifiers()
        if len(layers) == 1:
            return mapped(layers[0], readouts)
        parts = readouts.chunk(len(layers), dim=-1)
        return torch.stack([mapped(layer, part) for layer, part in zip(layers, parts, strict=True)]).mean(0)

    def classifier_weight(self, like: Tensor) -> Tensor:
        """The classifier's matrix (K, D'), for a tensor of the device and dtype of `like`."""
        layers = self.classifiers()
        size = self.attribution_head.readout_size // len(layers)
        weights = [weight_of(layer, size, like) for layer in layers]
        return weights[0] if len(layers) == 1 else torch.cat(weights, dim=1) / len(layers)

    @torch.no_grad()
    def explain(
        self,
        pixel_values: Tensor,
        labels: Sequence[int | str] | Tensor | None = None,
        *,
        evaluations: int = 0,
        upsample: bool = False,
        interpolate_pos_encoding: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Attribution maps of every image for all or for chosen labels, in logits.

        Args:
            pixel_values: (B, C, H, W).
            labels: None for all K; L label ids or names, the same for every image; or a long tensor (B, L).
            evaluations: 0 takes the one pass as it is. From 2 to 16,384: so many values of the game bring it nearer to
                the exact Shapley values, which half of their forwards under coalition structures cost.
            upsample: spread each patch's value evenly over its pixels, which keeps the sum: (H, W) instead of (h, w).
            interpolate_pos_encoding: ViT: allow other image sizes than the config's.
            generator: source of randomness for `evaluations`, on the CPU; None uses torch's global one.

        Returns:
            (B, K or L, h, w) float32 on the model's device; a map's sum is its label's logit less its base value.

        Raises:
            ValueError: for pixels or labels that do not fit, or an answer that is NaN or infinite.
        """
        grid = self._check_pixels(pixel_values, interpolate_pos_encoding, check_values=True)
        check_count(evaluations, "evaluations", 0)
        if labels is not None:
            labels = self._label_ids(labels, len(pixel_values))
        with evaluating(self):
            outputs = self(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, attributed=labels)
        self._check_answers(outputs)
        attributions = outputs.attributions
        if evaluations > 1:
            asked = self._ask(pixel_values, attributions, labels, evaluations, interpolate_pos_encoding, generator)
            attributions = torch.stack([found.values for found in asked]).to(attributions)
        maps = attribution_maps(attributions, grid)  # (B, K or L, h, w)
        return upsample_attributions(maps, (pixel_values.shape[-2], pixel_values.shape[-1])) if upsample else maps

    @torch.no_grad()
    def check_explanation(
        self,
        pixel_values: Tensor,
        labels: Sequence[int | str] | Tensor | None = None,
        *,
        maps: Tensor | None = None,
        evaluations: int = 16,
        interpolate_pos_encoding: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """How wrong each map of one pass is, judged by a few values of the game: a check that every map can carry.

        A map from a head that has learned too little, or of an image unlike those it learned from, shows. The fewer
        the evaluations, the less sure the judgement; `attribution_error_certificate` judges many images together.

        Args:
            pixel_values: (B, C, H, W).
            labels: as for `explain`; None for the predicted label alone.
            maps: (B, L, h, w), refined ones of these labels, to judge in place of those of one pass. The draws that
                refined them cannot judge them: pass `generator` on as `explain` left it, do not seed it again.
            evaluations: values of the game for each image, from 2 to 16,384.
            interpolate_pos_encoding: ViT: allow other image sizes than the config's.
            generator: source of randomness, on the CPU; None uses torch's global one.

        Returns:
            (B, L) float32: expected squared error over the expected variance of the exact values over the patches.
            0 is exact; 1 is no better than a map that gives every patch the same.
        """
        grid = self._check_pixels(pixel_values, interpolate_pos_encoding, check_values=True)
        check_count(evaluations, "evaluations", 2)
        with evaluating(self):
            outputs = self(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        self._check_answers(outputs)
        chosen = outputs.logits.argmax(-1, keepdim=True)
        if labels is not None:
            chosen = self._label_ids(labels, len(pixel_values))
        judged, judged_labels = outputs.attributions, None  # of all labels, which are wrong alike
        if maps is not None:
            check_floats(maps, "maps", (*chosen.shape, *grid), "give those that `explain` gives for these labels")
            judged, judged_labels = maps.flatten(2).transpose(1, 2), chosen
        asked = self._ask(pixel_values, judged, judged_labels, evaluations, interpolate_pos_encoding, generator)
        ratios = torch.stack([found.error_ratios for found in asked]).to(judged)  # (B, K or L)
        return ratios.gather(1, chosen) if maps is None else ratios

    def _ask(
        self,
        pixel_values: Tensor,
        attributions: Tensor,
        labels: Tensor | None,
        evaluations: int,
        interpolate_pos_encoding: bool | None,
        generator: torch.Generator | None,
    ) -> list[ShapleyPosterior]:
        """What evaluations say of each image's attributions, (B, N, K), or of its own labels (B, L), (B, N, L)."""
        device = pixel_values.device
        drawn = [
            coalitions_to_ask(evaluations, num_players=attributions.shape[1], generator=generator, device="cpu")
            for _ in pixel_values
        ]
        coalitions = torch.stack([torch.cat([torch.ones_like(rows[:1]), rows]) for rows in drawn])  # (B, R, N)
        pairs = with_complements(coalitions).to(device)  # (B, 2 R, N)
        values = self.game(pixel_values, labels, interpolate_pos_encoding=interpolate_pos_encoding)(pairs)
        odd = ((values[:, 0::2] - values[:, 1::2]) / 2).double().cpu()
        return list(map(shapley_posterior, attributions.double().cpu(), coalitions, odd))

    @torch.no_grad()
    def coalition_values(
        self,
        pixel_values: Tensor,
        coalitions: Tensor,
        *,
        batch_size: int = 1024,
        interpolate_pos_encoding: bool | None = None,
    ) -> Tensor:
        """The game itself: v(S) for M coalitions of each image.

        Where every second coalition is the complement of the one before, both come from one pass over the tokens.

        Args:
            pixel_values: (B, C, H, W).
            coalitions: (B, M, N) bool, True = present.
            batch_size: coalition structures in one forward, over all images.
            interpolate_pos_encoding: ViT: allow other image sizes than the config's.

        Returns:
            (B, M, K) float32, in logits.
        """
        height, width = self._check_pixels(pixel_values, interpolate_pos_encoding, check_values=True)
        check_coalitions(coalitions, height * width)
        if coalitions.ndim != 3 or len(coalitions) != len(pixel_values):
            raise ValueError(
                f"`coalitions` must be of shape (batch = {len(pixel_values)}, coalitions, players), "
                f"got {tuple(coalitions.shape)}."
            )
        check_count(batch_size, "batch_size")
        coalitions = coalitions.to(pixel_values.device)
        paired = coalitions.shape[1] % 2 == 0 and torch.equal(coalitions[:, 0::2], ~coalitions[:, 1::2])
        chunk = max(1, batch_size // len(pixel_values)) * (2 if paired else 1)
        with evaluating(self):
            embeddings = self.embed(pixel_values, bool(interpolate_pos_encoding))
            empty, base_values = self._empty_alone()
            parts = coalitions.split(chunk, dim=1)
            values = [self._values(embeddings, (height, width), part, paired, empty) for part in parts]
        # That of no player at all to the bit: a product with many rows rounds otherwise than one with a single row.
        return torch.where(coalitions.any(-1, keepdim=True), torch.cat(values, dim=1), base_values)

    def game(
        self,
        pixel_values: Tensor,
        labels: Sequence[int | str] | Tensor | None = None,
        *,
        batch_size: int = 1024,
        interpolate_pos_encoding: bool | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """The game of one image or of many as a function of coalitions, which estimators and metrics take.

        Args:
            pixel_values: (C, H, W) for the game of one image, (B, C, H, W) for one of many.
            labels: None for all K; else as for `explain`. An image's own may be a long tensor (L).
            batch_size: coalition structures in one forward, over all images.
            interpolate_pos_encoding: ViT: allow other image sizes than the config's.

        Returns:
            v: bool (M, N), True = present -> float32 (M, K or L), in logits; of many images bool (B, M, N) ->
            (B, M, K or L).

        Raises:
            ValueError: for pixels or labels that do not fit; the function, for coalitions that do not.
        """
        is_one = isinstance(pixel_values, Tensor) and pixel_values.ndim == 3
        images = pixel_values.unsqueeze(0) if is_one else pixel_values
        self._check_pixels(images, interpolate_pos_encoding, check_values=True)
        check_count(batch_size, "batch_size")
        ids = None if labels is None else self._label_ids(labels, len(images))

        def values_of(coalitions: Tensor) -> Tensor:
            check_coalitions(coalitions)
            if is_one and coalitions.ndim != 2:
                raise ValueError(
                    f"`coalitions` must be of shape (coalitions, players) in the game of one image, got "
                    f"{tuple(coalitions.shape)}: give `game` many images (B, C, H, W) for (B, coalitions, players)."
                )
            asked = coalitions.unsqueeze(0) if is_one else coalitions
            values = self.coalition_values(
                images, asked, batch_size=batch_size, interpolate_pos_encoding=interpolate_pos_encoding
            )
            if ids is not None:
                values = values.gather(2, ids.unsqueeze(1).expand(-1, values.shape[1], -1))
            return values.squeeze(0) if is_one else values

        return values_of

    def _values(
        self, embeddings: Tensor, grid: tuple[int, int], coalitions: Tensor, paired: bool, empty: Tensor
    ) -> Tensor:
        """v(S): (B, ...), (B, M, N) -> (B, M, K). With `paired`, coalition 2 j + 1 is the complement of 2 j."""
        structures = coalitions[:, 0::2] if paired else coalitions  # (B, R, N)
        members = torch.stack([structures, ~structures], dim=2)  # (B, R, 2, N)
        readouts = self.attribution_head.readouts(self._played(embeddings, grid, members), members, empty)
        return self.classify((readouts if paired else readouts[:, :, :1]).flatten(1, 2))


def attribution_maps(attributions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attributions on the grid of players, a view of them: (B, N, K) -> (B, K, h, w), N = h w."""
    return attributions.transpose(1, 2).unflatten(-1, grid)


def upsample_attributions(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Spread each patch's value evenly over its pixels: (..., h, w) -> (..., H, W), multiples of h and w; same sum."""
    check_floats(maps, "maps", [*["maps"] * (getattr(maps, "ndim", 2) - 2), "h", "w"])
    size = check_pair(size, "size", "(height, width) in pixels")
    rows, columns = size[0] // maps.shape[-2], size[1] // maps.shape[-1]
    if (maps.shape[-2] * rows, maps.shape[-1] * columns) != size or 0 in (rows, columns):
        raise ValueError(f"`size` must be a multiple of the grid {tuple(maps.shape[-2:])}, got {tuple(size)}.")
    spread = maps.repeat_interleave(rows, dim=-2).repeat_interleave(columns, dim=-1)
    return spread / (rows * columns)
