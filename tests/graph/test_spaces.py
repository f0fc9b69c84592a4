import math

from hypothesis import given, settings
from hypothesis import strategies as st

from bwla_compiler.graph.spaces import Freedom, Space, compound, constrain, leaves, piece, pin, pinned, unify


def test_unify_makes_one_class_and_keeps_the_lesser_freedom() -> None:
    a, b = Space(8), Space(8)
    constrain(b, Freedom.FIXES_ONES, "mean")
    unify(a, b, "add")
    assert a.find() is b.find()
    assert a.find().freedom == Freedom.FIXES_ONES
    assert a.find().reason == "mean"


def test_the_first_reason_stays() -> None:
    a = Space(4)
    pin(a, "first")
    pin(a, "second")
    assert a.reason == "first"


def test_pinning_a_product_pins_its_parts_and_a_part_alone_leaves_the_rest_free() -> None:
    heads, channels = Space(4), Space(16)
    both = compound("product", [heads, channels])
    pin(heads, "attention")
    assert [leaf.freedom for leaf in leaves(both)] == [Freedom.PINNED, Freedom.FREE]
    pin(both, "all")
    assert channels.find().freedom == Freedom.PINNED


def test_an_atom_takes_the_structure_of_a_product() -> None:
    atom = Space(64)
    unify(atom, compound("product", [pinned(4, "heads"), Space(16)]), "view")
    assert [leaf.size for leaf in leaves(atom)] == [4, 16]
    assert leaves(atom)[0].freedom == Freedom.PINNED
    assert leaves(atom)[1].freedom == Freedom.FREE


def test_a_product_against_a_sum_pins_both() -> None:
    product, total = compound("product", [Space(2), Space(4)]), compound("sum", [Space(3), Space(5)])
    unify(product, total, "add")
    assert all(leaf.freedom == Freedom.PINNED for leaf in (*leaves(product), *leaves(total)))


def test_factors_that_do_not_line_up_are_pinned() -> None:
    a, b = compound("product", [Space(4), Space(6)]), compound("product", [Space(6), Space(4)])
    unify(a, b, "view")
    assert all(leaf.freedom == Freedom.PINNED for leaf in leaves(a))


def test_a_slice_of_a_product_is_pinned() -> None:
    product = compound("product", [Space(4), Space(8)])
    part = piece(product, 0, 8, "slice")
    assert part.find().freedom == Freedom.PINNED
    assert all(leaf.freedom == Freedom.PINNED for leaf in leaves(product))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_pieces_of_a_sum_cover_it_in_order(sizes: list[int], data: st.DataObject) -> None:
    total = sum(sizes)
    space = Space(total)
    cut = data.draw(st.integers(1, total))
    left = piece(space, 0, cut, "slice")
    right = piece(space, cut, total, "slice") if cut < total else None
    found = [*leaves(left), *(leaves(right) if right else [])]
    assert found == leaves(space)
    assert sum(leaf.size for leaf in found) == total


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=4), st.lists(st.sampled_from([2, 3, 4]), max_size=4))
def test_unified_products_have_equal_leaves(left: list[int], right: list[int]) -> None:
    # the same total size, factored in another order of the same prime content or pinned where it cannot line up
    other = sorted(left, reverse=True) if not right or math.prod(right) != math.prod(left) else right
    a = compound("product", [Space(s) for s in left])
    b = compound("product", [Space(s) for s in other])
    unify(a, b, "view")
    free = [leaf for leaf in (*leaves(a), *leaves(b)) if leaf.freedom == Freedom.FREE]
    if free:
        assert leaves(a) == leaves(b)
    else:
        assert all(leaf.freedom == Freedom.PINNED for leaf in leaves(a))
