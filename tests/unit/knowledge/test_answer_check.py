"""AnswerCheck: written answers, held to their sources while they come."""

from __future__ import annotations

from forebay_server.knowledge.citations import AnswerCheck, Citation, Source, Unsupported
from forebay_server.knowledge.retrieval import RetrievedChunk
from hypothesis import given
from hypothesis import strategies as st

DOCUMENT = (
    "Preface. Every employee has thirty\ndays of holiday. A hotel may cost 140 euros a night."
)
OTHER = "Cats sleep for most of the day."


def chunk(document: str, text: str, start: int = 0) -> RetrievedChunk:
    end = start + len(text)
    return RetrievedChunk(f"{document}.0", document, document, 1, start, end, text, (), {}, 1.0)


def check(answer: str, sizes: tuple[int, ...] = (3,)) -> tuple[str, list[object]]:
    """The text that came out, and all else in order; fed in pieces of the sizes in turn."""
    sources = [chunk("a", DOCUMENT[9:], 9), chunk("b", OTHER)]
    checked = AnswerCheck(sources, {"a": Source(DOCUMENT), "b": Source(OTHER)}, "en")
    events = []
    at = i = 0
    while at < len(answer):
        size = sizes[i % len(sizes)]
        events += checked.feed(answer[at : at + size])
        at, i = at + size, i + 1
    events += checked.end()
    text = "".join(e for e in events if isinstance(e, str))
    return text, [e for e in events if not isinstance(e, str)]


def test_a_marker_cites_the_sentence_that_says_it() -> None:
    text, found = check("Employees get thirty days of holiday [1].")
    assert text == "Employees get thirty days of holiday [1]."
    (citation,) = found
    assert isinstance(citation, Citation) and citation.verified and citation.number == 1
    assert citation.quote == "Every employee has thirty\ndays of holiday."
    assert DOCUMENT[citation.start : citation.end] == citation.quote


def test_a_quote_is_cited_at_its_offsets_across_line_ends() -> None:
    _, found = check('They have "thirty days of holiday" [1].')
    (citation,) = found
    assert isinstance(citation, Citation) and citation.verified
    assert citation.quote == "thirty\ndays of holiday"
    assert DOCUMENT[citation.start : citation.end] == citation.quote


def test_a_quote_without_a_marker_is_cited_where_it_was_found() -> None:
    _, found = check("It is said: “sleep for most of the day”. Then something [2].")
    assert isinstance(found[0], Citation) and found[0].number == 2
    assert found[0].quote == "sleep for most of the day"


def test_what_is_not_in_the_sources_is_marked() -> None:
    answer = 'They get "forty days of holiday" [1]. Cats rule the world. A hotel may cost 150 euros [1]. Yes [7].'
    text, found = check(answer)
    assert text == answer
    reasons = {answer[u.start : u.end]: u.reason for u in found if isinstance(u, Unsupported)}
    assert reasons == {
        '"forty days of holiday"': "quote_not_found",
        "Cats rule the world.": "no_citation",
        "A hotel may cost 150 euros [1].": "not_in_source",
        "[7]": "no_such_source",
        "Yes [7].": "no_citation",
    }


def test_a_quote_is_judged_before_its_text_is_shown() -> None:
    sources = [chunk("b", OTHER)]
    checked = AnswerCheck(sources, {"b": Source(OTHER)}, "en")
    shown = "".join(str(e) for e in checked.feed('Cats "rule the wor'))
    assert shown == "Cats "
    events = checked.feed('ld" [1]')
    assert isinstance(events[0], Unsupported) and events[1] == '"rule the world"'


def test_a_citation_is_on_the_page_where_its_quote_begins() -> None:
    sources = [chunk("a", DOCUMENT)]
    place = DOCUMENT.index("A hotel")
    checked = AnswerCheck(sources, {"a": Source(DOCUMENT, [0, place])}, "en")
    events = checked.feed("A hotel may cost 140 euros [1]. ") + checked.end()
    assert [e.page for e in events if isinstance(e, Citation)] == [2]


def test_numbers_and_abbreviations_end_no_sentence() -> None:
    _, found = check(
        "Dr. Who says a hotel may cost 140 euros a night, i.e. not 3.5 times that [1]."
    )
    assert [u.reason for u in found if isinstance(u, Unsupported)] == ["not_in_source"]  # 3.5
    _, found = check("As Dr. Who says, a hotel may cost 140 euros a night [1].")
    assert not [u for u in found if isinstance(u, Unsupported)]


def test_several_numbers_in_one_marker() -> None:
    _, found = check("Employees have days of holiday and cats sleep most of the day [1, 2].")
    assert [c.number for c in found if isinstance(c, Citation)] == [1, 2]


WORDS = st.sampled_from(
    [
        "holiday",
        '"',
        "[",
        "]",
        "1",
        "[1]",
        "[2, 1]",
        "[9]",
        ". ",
        " ",
        "\n",
        "“thirty days”",
        "days",
        "«",
        "140",
    ]
)


@given(
    st.lists(WORDS, max_size=40).map("".join), st.lists(st.integers(1, 7), min_size=1, max_size=5)
)
def test_no_letter_is_lost_and_pieces_do_not_matter(answer: str, sizes: list[int]) -> None:
    text, found = check(answer, tuple(sizes))
    assert text == answer
    assert (text, found) == check(answer, (10_000,))
    for event in found:
        if isinstance(event, Unsupported):
            assert 0 <= event.start < event.end <= len(answer)
        else:
            assert isinstance(event, Citation) and event.verified
