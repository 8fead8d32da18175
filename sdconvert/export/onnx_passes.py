"""What onnxscript's optimizer does for our graphs, without the one rule whose time grows with the square of the nodes.

`onnxscript.optimizer.optimize` tries 46 rules at every node, twice. `SlicesSplit`, which looks at every pair of nodes,
took four fifths of its time on a UNet; most of the others look for ops that no model here has.
"""

import onnx_ir as ir
from onnx_ir.passes import PassManager, Sequential, common
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import (
    cast_cast_rule,
    fuse_pad_into_conv_rule,
    no_op_cast_rule,
    no_op_expand_rule,
    no_op_transpose_rule,
    normalize_pad_format_conv_rule,
    remove_optional_bias_from_conv_rule,
    remove_optional_bias_from_conv_transpose_rule,
    remove_optional_bias_from_gemm_rule,
    reshape_reshape_rule,
    squeeze_reshape_1d_rule,
    transpose_transpose_rule,
    unsqueeze_unsqueeze_rule,
)

_RULES = (
    cast_cast_rule,
    no_op_cast_rule,
    no_op_expand_rule,
    reshape_reshape_rule,
    no_op_transpose_rule,
    transpose_transpose_rule,
    unsqueeze_unsqueeze_rule,
    squeeze_reshape_1d_rule,
    normalize_pad_format_conv_rule,
    fuse_pad_into_conv_rule,
    remove_optional_bias_from_conv_rule,
    remove_optional_bias_from_conv_transpose_rule,
    remove_optional_bias_from_gemm_rule,
)
_TIMES = 2


class _FoldConstants(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return fold_constants(model, onnx_shape_inference=True)


def simplify_onnx(model: ir.Model) -> None:
    """Fold constants, merge ops that move values, drop what nothing reads and what is there twice; in place.

    Args:
        model: As PyTorch's exporter makes it with `optimize=False`.
    """
    unused = common.RemoveUnusedNodesPass()
    Sequential(
        PassManager([_FoldConstants(), RewritePass(_RULES), unused], steps=_TIMES, early_stop=True),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
