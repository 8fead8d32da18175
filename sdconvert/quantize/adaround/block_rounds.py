"""When a run of AdaRound comes by blocks: begin before their first group, train behind their last one, commit."""

from collections.abc import Callable, Mapping, Sequence

from sdconvert.quantize.adaround.advance import Frontiers, Weights
from sdconvert.quantize.adaround.blocks import Block, BlockFigures
from sdconvert.quantize.adaround.code_grid import CodeGrid
from sdconvert.quantize.adaround.commit import Commits, CommittedGroup
from sdconvert.quantize.adaround.reconstruct import BlockTask, Reconstruction, Start, reconstruct
from sdconvert.quantize.adaround.solve import LayerResult
from sdconvert.quantize.adaround.steps import SegmentedGraph
from sdconvert.quantize.adaround.store import ActivationStore


class BlockRounds:
    """The blocks of a run.

    Args:
        blocks: In execution order.
        settings: None without blocks.
        segmented: The graph.
        frontiers: On it.
        store: Where they wait.
        commits: For finished blocks.
        grids: Of all weights, for rounding to nearest.
        fitted: Samples that codes are fitted to.
        judging: Samples that judge.
        quantizers: The graph's quantizers are active on the quantized path.
        weights: Of the quantized path, as they are now.
        fingerprint: Of all that decides a block's codes.

    Attributes:
        fingerprints: Of the blocks.
        finished: Blocks that an earlier run had finished.
        covered: Their weights.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        settings: Reconstruction | None,
        segmented: SegmentedGraph,
        frontiers: Frontiers,
        store: ActivationStore,
        commits: Commits,
        grids: Mapping[str, CodeGrid],
        *,
        fitted: Sequence[int],
        judging: Sequence[int],
        quantizers: bool,
        weights: Weights,
        fingerprint: Callable[[Block], str],
    ) -> None:
        self._segmented, self._frontiers, self._store, self._commits = segmented, frontiers, store, commits
        self._settings, self._grids, self._fitted, self._judging = settings, grids, fitted, judging
        self._quantizers, self._weights = quantizers, weights
        self.fingerprints = [fingerprint(block) for block in blocks]
        found = [commits.find(mark, block.layers, grids) for mark, block in zip(self.fingerprints, blocks, strict=True)]
        self.finished = [committed for committed in found if committed is not None]
        self.covered = {name for committed in self.finished for name in committed.layers}
        self._open = {
            block.first: (block, mark)
            for block, mark, committed in zip(blocks, self.fingerprints, found, strict=True)
            if committed is None
        }
        self._count = len({*fitted, *judging})
        self._current: tuple[BlockTask, str] | None = None

    def before(self, index: int) -> None:
        """The frontiers stand at a group that is not solved yet."""
        if index in self._open:
            block, fingerprint = self._open[index]
            task = BlockTask(
                block,
                self._segmented,
                self._frontiers,
                self._store,
                samples=self._count,
                quantizers=self._quantizers,
                weights=self._weights,
            )
            self._current = task, fingerprint

    def behind(self, index: int, done: list[CommittedGroup]) -> bool:
        """The frontiers stand at a group that is solved: round the block that ends with it, if one does.

        Args:
            index: Of the group.
            done: Groups so far; those of the block lose its layers, the block is put in their place.

        Returns:
            Whether weights of the quantized path are others now.
        """
        if self._current is None or self._current[0].block.last != index:
            return False
        (task, fingerprint), self._current = self._current, None
        results, figures = self._reconstruct(task, done)
        committed = self._commits.commit(fingerprint, task.block.layers, results, figures)
        rest = [group.without(committed.layers) for group in done]
        self._commits.drop([group for group in rest if not group.layers])
        done[:] = [*(group for group in rest if group.layers), committed]
        # The frontier passed the block with the weights that moments gave.
        task.replay()
        task.close()
        return True

    def _reconstruct(
        self, task: BlockTask, done: Sequence[CommittedGroup]
    ) -> tuple[dict[str, LayerResult], BlockFigures]:
        assert self._settings is not None  # for the type checker
        parameters = self._segmented.parameters()
        of = {name: group for group in done for name in group.layers}
        names = [layer.name for layer in task.block.layers]
        starts = {
            name: Start(
                parameters[name].float(),
                of[name].codes(name).flatten(1).float(),
                of[name].grids[name],
                of[name].figures[name],
                of[name].biases.get(name),
            )
            for name in names
        }
        grids = {name: self._grids[name] for name in names}
        return reconstruct(task, starts, grids, self._fitted, self._judging, self._settings)
