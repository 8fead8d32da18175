"""Have the product of queries and keys take the keys as rows, and leave the transposition to the product.

    before   k (b, d, 1, T) -> Transpose (b, 1, d, T) -> Q/DQ -> MatMul(q, k)
    after    k (b, d, 1, T) -> Transpose (b, 1, T, d) -> Q/DQ -> Einsum(q, k), "abqd,abkd->abqk"

ONNX's MatMul cannot transpose an operand, the HTP's can: QNN's provider makes that of the Einsum (QAIRT 2.51, bit-equal
in the simulator). The Transpose that is left cancels against the layout of the convolution before it, so one goes per
head.
"""

from collections import Counter

from onnx import ModelProto, NodeProto, helper

_AS_COLUMNS = [0, 2, 1, 3]
_AS_ROWS = [0, 2, 3, 1]
_EQUATION = "abqd,abkd->abqk"
_PAIR = ("QuantizeLinear", "DequantizeLinear")


def take_keys_as_rows(model: ModelProto) -> int:
    """Rewrite every MatMul whose second operand comes from a convolution by way of such a Transpose, in place.

    Args:
        model: With a Q/DQ pair before the second operand of each dynamic MatMul, as `to_onnx` makes it.

    Returns:
        Number of products that were rewritten.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    readers = Counter(name for node in model.graph.node for name in node.input)
    readers.update(value.name for value in model.graph.output)
    changed: set[str] = set()
    count = 0
    for node in model.graph.node:
        if node.op_type != "MatMul":
            continue
        path = _path_to_transpose(node.input[1], producers)
        if path and all(readers[name] == 1 for name in path):
            transpose = producers[path[-1]]
            del transpose.attribute[:]
            transpose.attribute.append(helper.make_attribute("perm", _AS_ROWS))
            node.op_type = "Einsum"
            node.attribute.append(helper.make_attribute("equation", _EQUATION))
            changed.update(path)
            count += 1
    kept = [value for value in model.graph.value_info if value.name not in changed]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    return count


def _path_to_transpose(name: str, producers: dict[str, NodeProto]) -> list[str]:
    """Names of the tensors from a product back to the Transpose that makes columns of keys; empty without one."""
    path = [name]
    while (node := producers.get(path[-1])) is not None and node.op_type in _PAIR:
        path.append(node.input[0])
    if node is None or node.op_type != "Transpose":
        return []
    return path if list(helper.get_node_attr_value(node, "perm")) == _AS_COLUMNS else []
