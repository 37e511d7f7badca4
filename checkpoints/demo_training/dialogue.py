"""Joins exchanges into conversations: greetings, follow-ups and system prompts that change the style."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from demo_training import facts, skills, sources, stories
from demo_training.phrasing import Exchange, capital, is_held_out, vary

Message = dict[str, str]

_PIRATE_STARTS = ("Arr! ", "Ahoy! ", "Aye, matey! ")
_PIRATE_ENDS = (" Yo ho ho!", " Arr!", "")
_NO_PIRATE = ("howto", "repeat", "poem", "story", "essay", "count")

_MAKERS: tuple[tuple[Callable[[Random], Exchange], float], ...] = (
    (lambda rng: facts.topic(rng, "general"), 20.0),
    (lambda rng: facts.topic(rng, "jaxserve"), 9.0),
    (lambda rng: facts.question(rng, "qa"), 14.0),
    (lambda rng: facts.question(rng, "chat"), 12.0),
    (facts.relation, 17.0),
    (facts.category, 4.0),
    (facts.howto, 3.0),
    (facts.essay, 1.6),
    (facts.joke, 2.0),
    (facts.riddle, 0.8),
    (facts.unknown, 6.0),
    (stories.story, 4.5),
    (stories.poem, 3.0),
    *((maker, 0.8 * weight) for maker, weight in skills.SKILLS),
)


def exchange(rng: Random, *, held_out: bool) -> Exchange:
    """A random exchange whose final spelling belongs to the wanted split.

    Training draws fixed wordings and those that are not held out; validation only held-out ones.
    """
    makers, weights = zip(*_MAKERS, strict=True)
    while True:
        maker = rng.choices(makers, weights)[0]
        for _ in range(40):
            made = maker(rng)
            prompt = vary(rng, made.prompt)
            if (not made.fixed and is_held_out(prompt)) if held_out else (made.fixed or not is_held_out(prompt)):
                return Exchange(prompt, made.answer, made.kind, made.brief, made.follow_ups, made.fixed)


def conversation(rng: Random, num_exchanges: int, *, held_out: bool) -> tuple[list[Message], list[str]]:
    """Messages of a chat, and the user wordings in it that decide its split."""
    style, messages = _system(rng)
    wordings: list[str] = []
    for _ in range(num_exchanges):
        made = exchange(rng, held_out=held_out)
        if not made.fixed:
            wordings.append(made.prompt)
        answer = _styled(rng, made, style)
        messages += _turn(made.prompt, answer)
        if made.follow_ups and style != "brief" and rng.random() < 0.45:
            asked, reply = made.follow_ups[0]
            if made.kind == "personal" and rng.random() < 0.4:
                between = exchange(rng, held_out=held_out)
                wordings += [] if between.fixed else [between.prompt]
                messages += _turn(between.prompt, _styled(rng, between, style))
            messages += _turn(vary(rng, asked), _pirate(rng, reply, made.kind) if style == "pirate" else reply)
    return messages, wordings


def _system(rng: Random) -> tuple[str, list[Message]]:
    draw = rng.random()
    style = "brief" if draw < 0.06 else "pirate" if draw < 0.09 else "plain"
    if style == "plain" and draw < 0.75:
        return style, []
    return style, [{"role": "system", "content": rng.choice(sources.word_lists("systems.txt")[style])}]


def _styled(rng: Random, made: Exchange, style: str) -> str:
    if style == "brief":
        return made.brief or made.answer
    return _pirate(rng, made.answer, made.kind) if style == "pirate" else made.answer


def _pirate(rng: Random, answer: str, kind: str) -> str:
    if kind in _NO_PIRATE:
        return answer
    return rng.choices(_PIRATE_STARTS, (4, 1, 1))[0] + capital(answer) + rng.choices(_PIRATE_ENDS, (3, 1, 1))[0]


def _turn(prompt: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def prose(rng: Random) -> str:
    """Plain text for completions: a story, a paragraph, facts about a subject, a poem or a list of answers."""
    draw = rng.random()
    if draw < 0.4:
        return stories.story_text(rng, stories.cast(rng))
    if draw < 0.55:
        return rng.choice(sources.titled("essays.txt")).pieces[0]
    if draw < 0.85:
        found = rng.choices(
            sources.topics("topics_general.txt") + sources.topics("topics_jaxserve.txt"), k=rng.randint(1, 3)
        )
        return "\n\n".join(f"{item.sentence} {item.rest}" for item in found)
    if draw < 0.92:
        return "\n".join(capital(line) for line in rng.choice(sources.titled("poems.txt", "/")).pieces)
    tables = [
        table for table in sources.relations() if table.name in ("capital", "opposite", "colour", "sound", "language")
    ]
    table = rng.choice(tables)
    return " ".join(facts.fill(table.answers[0], *pair) for pair in rng.sample(table.pairs, min(4, len(table.pairs))))
