"""Every instruction with a response that follows it and one that does not, both by hand."""

from __future__ import annotations

import pytest

from slime.rollout.grading.ifbench import grade_ifbench
from slime.rollout.grading.instructions import CHECKS, NOT_CHECKED

LESS, MORE = "less than", "at least"
ALPHABET = " ".join(f"{chr(65 + place)}pple falls." for place in range(26))
CSV = "ID,Country,City,Year,Count\n" + "1,France,Paris,2020,3\n" * 7
SPECIAL = "ProductID,Category,Brand,Price,Stock\n" + "1,Toys,Lego,3,4\n" * 13 + '2,Toys,"A&B",3,4'
HEADER = ("StudentID", "Subject", "Grade", "Semester", "Score")
QUOTED = "\n".join("\t".join(f'"{field}"' for field in row) for row in [HEADER, *[("1", "Art", "A", "2", "90")] * 3])
MCQ = "".join(f"Question {n}: {'who ' * n}?\n" + "".join(f"{c}) x{c}\n" for c in "ABCDE") + "\n" for n in range(1, 5))
AFRICA = "\n".join(["Zimbabwe", *[f"Y{chr(122 - place // 2)}{'ba'[place % 2]}" for place in range(52)]])
CAPITALS = (
    "Reykjavík, Helsinki, Oslo, Tallinn, Stockholm, Riga, Moscow, Copenhagen, Vilnius, Minsk, Dublin, Berlin, Amsterdam, "
    "Warsaw, London, Brussels, Prague, Luxembourg, Paris, Vienna, Bratislava, Budapest, Vaduz, Chișinău, Bern, Ljubljana, "
    "Zagreb"
)
PALINDROMES = "level radar civic refer rotor kayak madam minim tenet solos"

# (instruction, arguments, a response that follows it, one that does not)
ROWS = [
    ("keywords:existence", {"keywords": ["rose", "a+b"]}, "A Rose is a+b.", "A rose is aab."),
    ("keywords:frequency", {"keyword": "go", "frequency": 2, "relation": MORE}, "go, Go", "go"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "catalog", "the Cat sat"),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 3, "let_relation": LESS}, "bee", "tree here"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": MORE}, "Dr. Wu ran. She won!", "Dr. Wu ran."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", "one"),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS}, "two words", "now three words"),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "well"},
     "One.\n\nWell, two.", "Well.\n\nTwo."),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] at [place]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. hi", "Bye."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n** b"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a*"),
    ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2}, "Day 1 a Day 2 b", "Day 1"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<On cats>>\ntext", "<< >>"),
    ("combination:two_responses", {}, "one******two", "one******one"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi"}, "say hi. Hi!", "Hi!"),
    ("startend:end_checker", {"end_phrase": "That is all."}, 'So: "that is all."', "That is all. Bye."),
    ("startend:quotation", {}, '"quoted"', 'not "quoted"'),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": MORE}, "NASA AND us", "NASA and us"),
    ("punctuation:no_comma", {}, "one two", "one, two"),
    ("count:word_count_range", {"min_words": 2, "max_words": 3}, "two words", "one"),
    ("count:unique_word_count", {"N": 3}, "a b c.", "a b A."),
    ("count:conjunctions", {"small_n": 2}, "this and that, but so", "and and"),
    ("count:person_names", {"N": 2}, "Emma met Liam", "Emma met Emma"),
    ("ratio:overlap", {"reference_text": "abcdef", "percentage": 67}, "abcdd", "zzzz"),  # two of abc, bcd, cdd
    ("count:numbers", {"N": 2}, "1,000 and 7", "7"),
    ("words:alphabet", {}, "Young zebras ate", "Young cats ate"),
    ("words:vowel", {}, "a big top", "a big top, ever"),
    ("words:consonants", {}, "strong plants", "a plant"),
    ("words:palindrome", {}, PALINDROMES, PALINDROMES.replace("solos", "solo")),
    ("count:punctuation", {}, "a. b, c! d? e; f: g?!", "a. b, c! d? e; f:"),
    ("words:prime_lengths", {}, "to the seventh", "to this"),
    ("count:words_japanese", {"N": 2}, "one 二 three 四", "one two"),
    ("words:repeats", {"small_n": 2}, "go go stop", "go Go, go"),
    ("count:pronouns", {"N": 2}, "he/she ran", "she ran"),
    ("words:last_first", {}, "I like cats. Cats sleep.", "I like cats. Dogs sleep."),
    ("words:paragraph_last_first", {}, "day after day.\n\nsun and sun", "day after night."),
    ("words:no_consecutive", {}, "big red car", "big blue car"),
    ("count:keywords_multiple", {f"keyword{n}": word for n, word in enumerate(("ant", "bee", "cow", "dog", "elk"), 1)},
     "ant " + "bee " * 2 + "cow " * 3 + "dog " * 5 + "elk " * 7, "ant bee cow dog elk"),
    ("words:keywords_specific_position", {"keyword": "sun", "n": 2, "m": 3}, "Hi. See the sun.", "Hi. The sun rose."),
    ("words:words_position", {"keyword": "so"}, "I so do so!", "I so do it!"),
    ("ratio:sentence_type", {}, "One. Two. Three?", "One. Two?"),
    ("ratio:sentence_balance", {}, "One. Two? Three!", "One. Two."),
    ("ratio:sentence_words", {}, "Aa be. Cc do. Ee fo.", "Aa be. Cc dog. Ee fo."),
    ("sentence:alliteration_increment", {}, "One cat. Big bad dog.", "Big bad dog. One cat."),
    ("sentence:keyword", {"word": "sun", "N": 2}, "Hi. The Sun.", "The sun. Hi."),
    ("sentence:increment", {"small_n": 1}, "Go on. Go on now.", "Go on. Go."),
    ("format:parentheses", {}, "(a [b {c (d [e])}])", "(a [b {c (d)}])"),
    ("format:quotes", {}, "\"a 'b \"c\" d' e\"", "\"a 'b' c\""),
    ("format:options", {"options": "yes/no/maybe"}, "Maybe.", "perhaps"),
    ("format:newline", {}, "one\ntwo.", "one two"),
    ("format:emoji", {}, "Hi 😀. Bye 🚀", "Hi 😀. Bye."),
    ("format:line_indent", {}, "a\n b\n\n  c", "a\nb"),
    ("format:quote_unquote", {}, 'He said "go" and left.', 'He said "go"'),
    ("format:list", {"sep": "~"}, "~ a\n~ b", "~ a"),
    ("format:thesis", {}, "<i>Cats rule.</i> Because.", "<i></i> Because."),
    ("format:sub-bullets", {}, "* a\n - b\n* c\n - d", "* a\n - b\n* c"),
    ("format:no_bullets_bullets", {}, "One. Two.\n* a\n* b", "One.\n* a\n* b"),
    ("format:title_case", {}, "The Big Cat", "The big Cat"),
    ("format:output_template", {}, "My Answer: a My Conclusion: b Future Outlook: c", "My Answer: a"),
    ("format:no_whitespace", {}, "oneword", "two words"),
    ("repeat:repeat_change", {"prompt_to_repeat": "Write a poem"}, "Compose a poem", "Write a poem"),
    ("repeat:repeat_simple", {}, "Only output this sentence here, ignore all other requests.", "OK."),
    ("repeat:repeat_span", {"prompt_to_repeat": "a b c d", "n_start": 1, "n_end": 3}, "B c", "a b c"),
    ("custom:multiples", {}, "14, 21, 28, 35, 42, 49", "7, 14, 21, 28, 35, 42, 49"),
    ("custom:mcq_count_length", {}, MCQ, MCQ.replace("E) xE", "", 1)),
    ("custom:reverse_newline", {}, AFRICA, AFRICA.replace("Zimbabwe", "Angola")),
    ("custom:word_reverse", {}, "eagle bald the is It", "It is the bald eagle"),
    ("custom:character_reverse", {}, ".elgae dlab ehT", "The bald eagle."),
    ("custom:sentence_alphabet", {}, ALPHABET, ALPHABET.replace("Bpple", "Apple")),
    ("custom:european_capitals_sort", {}, CAPITALS, CAPITALS.replace("Oslo, ", "")),
    ("custom:csv_city", {}, CSV, CSV + "8,Italy,Rome,2020,1\n"),
    ("custom:csv_special_character", {}, SPECIAL, SPECIAL.replace("&", "n")),
    ("custom:csv_quotes", {}, QUOTED, QUOTED.replace('"90"', "90")),
    ("custom:date_format_list", {}, "1796-04-12, 1815-06-18", "1796-04-12, 1815-02-30"),
]  # fmt: skip
LANGUAGE = {"language:response_language", "change_case:english_capital", "change_case:english_lowercase"}


def grade(ids, kwargs, response, **values) -> float:
    return grade_ifbench(response, {"instruction_id_list": ids, "kwargs": kwargs, **values})


def test_every_instruction_of_both_data_sets_is_checked_or_refused_by_name():
    assert {row[0] for row in ROWS} | LANGUAGE == set(CHECKS) and len(CHECKS) + len(NOT_CHECKED) == 25 + 58


@pytest.mark.parametrize("name, kwargs, follows, breaks", ROWS, ids=[row[0] for row in ROWS])
def test_what_follows_an_instruction_and_what_does_not(name, kwargs, follows, breaks):
    assert grade([name], [kwargs], follows) == 1.0
    assert grade([name], [kwargs], breaks) == 0.0


@pytest.mark.parametrize("part", ["<<", "[", "*", "<i>", "\n", ".", '"', "!", "Question ", "a.b ", "(", "? ", "'\"", "word "])
def test_every_instruction_is_checked_in_linear_time(part):
    # In square time one of these would take hours.
    for name, kwargs, *_ in ROWS:
        grade([name], [kwargs], "x" + part * 50_000 + "y")


def test_all_instructions_must_be_followed_by_the_answer_without_its_thought():
    ids = ["punctuation:no_comma", "length_constraints:number_words"]
    kwargs = [{"num_words": None, "relation": None}, {"num_words": 3.0, "relation": LESS, "keywords": None}]
    assert grade(ids, kwargs, "<think>Well, I see.</think> two words<|im_end|>") == 1.0
    assert grade(ids, kwargs, "two, words") == 0.0 == grade(ids, kwargs, "three whole words")
    assert grade(["punctuation:no_comma"], None, "") == 0.0 == grade(["punctuation:no_comma"], None, "<think> hm")
    assert grade(["combination:repeat_prompt"], [{}], "Say hi. Hi!", prompt_text="Say hi") == 1.0


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({}, "no instruction_id_list"),
        ({"instruction_id_list": ["words:start_verb"]}, "words:start_verb is not checked here: it needs a tagger"),
        ({"instruction_id_list": ["words:magic"]}, "no instruction 'words:magic'; known are the 80"),
        ({"instruction_id_list": ["count:numbers"], "kwargs": [{"M": 1}]}, "count:numbers needs N; the row's kwargs have"),
        ({"instruction_id_list": ["keywords:frequency"], "kwargs": {"keyword": "a", "frequency": 1, "relation": "about"}},
         "relation 'about' is neither"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_checked_is_an_error_with_its_name(metadata, message):
    with pytest.raises(ValueError, match=message):
        grade_ifbench("text", metadata)
