"""Exchanges that are computed, not looked up: sums, counting, spelling, repeating, reading a given fact."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from demo_training import sources
from demo_training.phrasing import Exchange, capital, with_article

_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_ASK_SUM = (
    "What is {e}?", "What is {e}?", "{e}", "{e} = ?", "{e}?", "How much is {e}?", "Calculate {e}", "Compute {e}",
    "Can you calculate {e}?", "Tell me what {e} is", "What does {e} make?", "What do you get for {e}?", "Solve {e}",
)  # fmt: skip
_RHYMES = (
    ("cat", "hat"), ("dog", "frog"), ("house", "mouse"), ("tree", "bee"), ("moon", "spoon"), ("star", "car"),
    ("light", "night"), ("rain", "train"), ("sun", "fun"), ("bear", "chair"), ("cake", "lake"), ("king", "ring"),
    ("ball", "wall"), ("book", "cook"), ("day", "play"), ("sea", "tea"), ("snow", "slow"), ("fox", "box"),
)  # fmt: skip


def arithmetic(rng: Random) -> Exchange:
    """Sums and differences up to 20 and the table up to ten times ten, in digits or in words."""
    sign = rng.choices("+-*", (5, 3, 4))[0]
    if sign == "*":
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        result = a * b
    else:
        a = rng.randint(0, 20)
        b = rng.randint(0, min(a, 20) if sign == "-" else 20 - a)
        result = a + b if sign == "+" else a - b
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    if rng.random() < 0.25:
        expression, answer = (
            f"{_NUMBERS[a]} {word} {_NUMBERS[b]}",
            f"{_words(a)} {word} {_words(b)} is {_words(result)}.",
        )
        brief = f"{capital(_words(result))}."
    else:
        symbol = "x" if sign == "*" and rng.random() < 0.5 else sign
        infix = rng.choice((f" {symbol} ", f" {symbol} ", symbol, f" {word} "))
        expression, answer, brief = f"{a}{infix}{b}", f"{a} {word} {b} is {result}.", f"{result}."
    return Exchange(rng.choice(_ASK_SUM).format(e=expression), capital(answer), "arithmetic", brief)


def _words(number: int) -> str:
    return _NUMBERS[number] if number <= 20 else str(number)


def compare_numbers(rng: Random) -> Exchange:
    a, b = rng.sample(range(31), 2)
    larger = rng.random() < 0.6
    form = rng.choice(("Which is {w}, {a} or {b}?", "Which number is {w}, {a} or {b}?", "What is {w}, {a} or {b}?"))
    word = rng.choice(("larger", "bigger")) if larger else "smaller"
    answer = max(a, b) if larger else min(a, b)
    other = min(a, b) if larger else max(a, b)
    text = f"{answer} is {word} than {other}."
    return Exchange(form.format(w=word, a=a, b=b), text, "compare", f"{answer}.")


def even_or_odd(rng: Random) -> Exchange:
    number = rng.randint(0, 50)
    even, asked_even = number % 2 == 0, rng.random() < 0.5
    if rng.random() < 0.4:
        return Exchange(f"Is {number} even or odd?", f"{number} is {'even' if even else 'odd'}.", "parity")
    start = "Yes" if even == asked_even else "No"
    prompt = f"Is {number} an {'even' if asked_even else 'odd'} number?"
    return Exchange(prompt, f"{start}, {number} is {'even' if even else 'odd'}.", "parity", f"{start}.")


def counting(rng: Random) -> Exchange:
    """Counting up or down over at most twenty numbers, and the neighbours of a number."""
    if rng.random() < 0.35:
        number, after = rng.randint(1, 50), rng.random() < 0.6
        where, result = ("after", number + 1) if after else ("before", number - 1)
        form = rng.choice(("What comes {w} {n}?", "Which number comes {w} {n}?", "What number is {w} {n}?"))
        return Exchange(form.format(w=where, n=number), f"{result} comes {where} {number}.", "count", f"{result}.")
    start = rng.choice((1, 1, 1, rng.randint(1, 10)))
    stop = start + rng.randint(2, 19)
    if rng.random() < 0.3:
        stop = rng.randint(3, 12)
        numbers = ", ".join(str(n) for n in range(stop, 0, -1))
        forms = ("Count down from {b}", "Count backwards from {b}", "Can you count down from {b}?")
        return Exchange(rng.choice(forms).format(b=stop), f"{numbers}.", "count")
    forms = ("Count from {a} to {b}", "Can you count from {a} to {b}?", "List the numbers from {a} to {b}")
    if start == 1:
        forms += ("Count to {b}", "Can you count to {b}?", "Count up to {b}", "Please count to {b}")
    numbers = ", ".join(str(n) for n in range(start, stop + 1))
    bounds = (_NUMBERS[start], _NUMBERS[stop]) if stop <= 20 and rng.random() < 0.3 else (start, stop)
    return Exchange(rng.choice(forms).format(a=bounds[0], b=bounds[1]), f"{numbers}.", "count")


def spelling(rng: Random) -> Exchange:
    word = rng.choice(sources.word_lists()["spell"])
    draw = rng.random()
    if draw < 0.5:
        form = rng.choice(
            ("Spell {w}", "Spell the word {w}", "How do you spell {w}?", "Can you spell {w}?", "How is {w} spelled?")
        )
        letters = "-".join(word.upper())
        return Exchange(form.format(w=word), f"{capital(word)} is spelled {letters}.", "spell", f"{letters}.")
    if draw < 0.75:
        form = rng.choice(
            ("How many letters does {w} have?", "How many letters are in {w}?", "Count the letters in {w}")
        )
        number = _NUMBERS[len(word)]
        return Exchange(form.format(w=word), f"{capital(word)} has {number} letters.", "spell", f"{capital(number)}.")
    last = rng.random() < 0.3
    form = rng.choice(("What is the {p} letter of {w}?", "Which letter is the {p} one in {w}?"))
    place, letter = ("last", word[-1]) if last else ("first", word[0])
    answer = f"The {place} letter of {word} is {letter.upper()}."
    return Exchange(form.format(p=place, w=word), answer, "spell", f"{letter.upper()}.")


def rhyme(rng: Random) -> Exchange:
    pair = rng.choice(_RHYMES)
    word, other = pair if rng.random() < 0.5 else pair[::-1]
    form = rng.choice(
        ("What rhymes with {w}?", "Which word rhymes with {w}?", "Find a rhyme for {w}", "Give me a rhyme for {w}")
    )
    return Exchange(form.format(w=word), f"{capital(other)} rhymes with {word}.", "rhyme", f"{capital(other)}.")


def repeat(rng: Random) -> Exchange:
    """Copying what the user wrote: a phrase of the list, or some words that never stood together before."""
    words = sources.word_lists()
    draw = rng.random()
    if draw < 0.25:
        word, times = rng.choice(words["spell"]), rng.choice(("two", "three", "four"))
        line = " ".join([word] * _NUMBERS.index(times))
        return Exchange(f"Say {word} {times} times", f"{capital(line)}.", "repeat")
    if draw < 0.6:
        phrase = rng.choice(words["phrases"])
    else:
        phrase = " ".join(rng.sample(words["spell"] + words["objects"], rng.randint(2, 5)))
    form = rng.choice(
        ('Repeat: "{p}"', "Repeat after me: {p}", "Say: {p}", 'Say "{p}"', "Repeat this: {p}", "Please repeat: {p}")
    )
    return Exchange(form.format(p=phrase), capital(phrase) + ".", "repeat")


def reading(rng: Random) -> Exchange:
    """A fact is given in the question, and the answer has to use it."""
    words = sources.word_lists()
    name = rng.choice(words["names_f"] + words["names_m"])
    he = "she" if name in words["names_f"] else "he"
    thing, colour = rng.choice(words["objects"]), rng.choice(words["colours"])
    room, liked = rng.choice(words["rooms"]), rng.choice(words["likes"])
    number, more = rng.randint(1, 9), rng.randint(1, 9)
    cases: tuple[tuple[str, str, str], ...] = (
        (f"{name} has a {colour} {thing}. What colour is the {thing}?", f"The {thing} is {colour}.", colour),
        (f"The {thing} is {colour}. What colour is the {thing}?", f"The {thing} is {colour}.", colour),
        (f"{name} is in the {room}. Where is {name}?", f"{name} is in the {room}.", f"in the {room}"),
        (f"{name} likes {liked}. What does {name} like?", f"{name} likes {liked}.", liked),
        (f"{name} has a {colour} {thing}. Who has the {thing}?", f"{name} has the {thing}.", name),
        (f"The {thing} is in the {room}. Where is the {thing}?", f"The {thing} is in the {room}.", f"in the {room}"),
        (
            f"{name} has {number} apples and gets {more} more. How many apples does {he} have?",
            f"{name} has {number + more} apples.",
            str(number + more),
        ),
    )
    prompt, answer, brief = rng.choice(cases)
    return Exchange(with_article(prompt), with_article(answer), "reading", f"{capital(brief)}.")


def personal(rng: Random) -> Exchange:
    """The user says something about themselves and asks for it later."""
    words = sources.word_lists()
    name = rng.choice(words["names_f"] + words["names_m"])
    liked, city = rng.choice(words["likes"]), rng.choice(words["cities"])
    kinds = (
        (
            rng.choice(("My name is {v}", "I am {v}", "Call me {v}", "Hello, I am {v}", "Hi, my name is {v}")),
            name,
            "Nice to meet you, {v}! How can I help you?",
            rng.choice(("What is my name?", "Who am I?", "Do you remember my name?", "Do you know my name?")),
            "Your name is {v}.",
        ),
        (
            rng.choice(("I like {v}", "I love {v}", "I really like {v}", "My favourite thing is {v}")),
            liked,
            "That is nice! What do you like about {v}?",
            rng.choice(("What do I like?", "Do you remember what I like?", "What did I say that I like?")),
            "You like {v}.",
        ),
        (
            rng.choice(("I live in {v}", "My home is {v}", "I come from {v}", "I am from {v}")),
            city,
            "{v} is a beautiful city! How can I help you?",
            rng.choice(("Where do I live?", "Where am I from?", "In which city do I live?")),
            "You live in {v}.",
        ),
    )
    told, value, reply, asked, answer = kinds[rng.choices(range(3), (5, 3, 2))[0]]
    follow = (asked, answer.format(v=value))
    return Exchange(told.format(v=value), reply.format(v=value), "personal", "", (follow,), True)


SKILLS: tuple[tuple[Callable[[Random], Exchange], float], ...] = (
    (arithmetic, 7.0),
    (compare_numbers, 0.7),
    (even_or_odd, 0.7),
    (counting, 1.5),
    (spelling, 1.5),
    (rhyme, 0.5),
    (repeat, 1.5),
    (reading, 1.5),
    (personal, 1.5),
)
