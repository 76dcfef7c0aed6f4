import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness_ext.sweep.scoring import copy_similarity, score_copy, score_retrieval

KEY = "71432"


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (" 71432", "exact"),
        ("71432.\nThe grass is green.", "exact"),
        ("The pass key is 71432. Remember it.", "exact"),
        ("99999, then 71432", "lenient"),
        ("714321", "wrong_value"),
        ("171432", "wrong_value"),
        ("99999", "wrong_value"),
        ("I do not know.", "no_value"),
        ("", "no_value"),
        (" 714", "cut_off"),
        (" 714.", "wrong_value"),
        ("7 1 4 3 2", "wrong_value"),
    ],
)
def test_a_passkey_answer_gets_its_verdict(answer: str, verdict: str) -> None:
    assert score_retrieval(answer, [KEY], "digits") == verdict


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("1111111, 2222222", "exact"),
        ("1111111 and 2222222.", "exact"),
        ("2222222 and 1111111", "lenient"),
        ("1111111", "cut_off"),
        ("1111111.", "wrong_value"),
        ("1111111 and 222", "cut_off"),
    ],
)
def test_several_values_are_all_asked_for_and_in_order(answer: str, verdict: str) -> None:
    assert score_retrieval(answer, ["1111111", "2222222"], "digits") == verdict


def test_a_uuid_is_compared_whatever_its_case() -> None:
    value = "123e4567-e89b-42d3-a456-426614174000"
    assert score_retrieval(value.upper(), [value], "uuid") == "exact"
    assert score_retrieval(value[:-1], [value], "uuid") == "cut_off"


@given(st.text(), st.integers(10000, 99999).map(str))
def test_an_answer_that_holds_the_key_as_no_whole_token_is_never_right(noise: str, key: str) -> None:
    answer = noise.replace(key, "")
    if key not in answer:
        assert score_retrieval(answer, [key], "digits") not in ("exact", "lenient")


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1), st.lists(st.sampled_from("abcdefgh")))
def test_copy_similarity_is_one_for_the_passage_alone_and_agrees_with_the_recursion(wanted: list[str], got: list[str]) -> None:
    def distance(a: tuple[str, ...], b: tuple[str, ...]) -> int:
        table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
        for i in range(1, len(a) + 1):
            for j in range(1, len(b) + 1):
                table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
        return table[len(a), len(b)]

    cut = got[: len(wanted)]
    expected = 1 - distance(tuple(wanted), tuple(cut)) / len(wanted)
    assert copy_similarity(" ".join(got), " ".join(wanted)) == pytest.approx(expected)
    assert (copy_similarity(" ".join(got), " ".join(wanted)) == 1) == (cut == wanted)
    assert (score_copy(" ".join(got), " ".join(wanted)) == "exact") == (cut == wanted)
