"""Stories grown from the plots in `data/stories.txt`, and poems.

A story keeps one hero, one friend and one place from its first sentence to its last.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from string import Template

from demo_training import sources
from demo_training.phrasing import Exchange, capital, with_article

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_FEMALE = ("princess", "witch", "girl")
_MALE = ("boy", "prince", "wizard", "knight", "king")


@dataclass(frozen=True, slots=True)
class Cast:
    hero: str
    name: str
    female: bool
    friend: str
    friend_name: str
    place: str
    thing: str
    food: str
    trait: str


def cast(rng: Random) -> Cast:
    words = sources.word_lists()
    hero = rng.choice(words["animals"]) if rng.random() < 0.7 else rng.choice((*words["people"], "robot"))
    friend = rng.choice([animal for animal in words["animals"] if animal != hero])
    female = hero in _FEMALE or (hero not in _MALE and rng.random() < 0.5)
    name = rng.choice(words["names_f"] if female else words["names_m"])
    other = rng.choice([n for n in words["names_f"] + words["names_m"] if n != name])
    picked = (rng.choice(words[key]) for key in ("places", "things", "foods", "traits"))
    return Cast(hero, name, female, friend, other, *picked)


def story_text(rng: Random, who: Cast) -> str:
    """One story of 80 to 130 words about `who`."""
    plots = sources.plots()
    plot = plots[-1] if who.hero == "robot" and rng.random() < 0.6 else rng.choice(plots[:-1])
    text = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("/")), plot)
    he, his, him = ("she", "her", "her") if who.female else ("he", "his", "him")
    filled = Template(text).substitute(
        hero=who.hero, Name=who.name, friend=who.friend, Friend=who.friend_name, place=who.place, thing=who.thing,
        food=who.food, trait=who.trait, he=he, his=his, him=him, He=capital(he), His=capital(his),
    )  # fmt: skip
    return with_article(filled)


def story(rng: Random) -> Exchange:
    who = cast(rng)
    draw = rng.random()
    if draw < 0.3:
        form = rng.choice((
            "Tell me a story", "Tell me a story", "Tell a story", "Can you tell me a story?", "Write a story",
            "I want to hear a story", "Do you know a story?", "Tell me a bedtime story", "Write a short story",
            "Tell me a short story", "Please tell me a story", "Can you write a story for me?", "Make up a story",
            "Tell me a fairy tale", "I would like a story",
        ))  # fmt: skip
        fixed = True
    else:
        fixed = False
        subject = f"a {who.hero}"
        if draw > 0.9:
            subject += f" named {who.name}"
        elif draw > 0.8:
            subject += f" and a {who.friend}"
        form = rng.choice((
            "Tell me a story about {x}", "Tell me a story about {x}", "Write a story about {x}", "A story about {x}",
            "Can you tell me a story about {x}?", "Tell me a short story about {x}", "Write a short story about {x}",
            "I want to hear a story about {x}", "Make up a story about {x}", "Do you know a story about {x}?",
            "Tell me a bedtime story about {x}", "Once more: a story about {x}",
        )).format(x=subject)  # fmt: skip
    again = rng.choice(("Another one", "Tell me another story", "One more story please", "Another story"))
    follow = (again, story_text(rng, cast(rng))) if rng.random() < 0.5 else _ask_about(rng, who)
    return Exchange(with_article(form), story_text(rng, who), "story", "", (follow,), fixed)


def _ask_about(rng: Random, who: Cast) -> tuple[str, str]:
    """A question about the story just told, which only its text can answer."""
    return rng.choice((
        (f"What was the name of the {who.hero}?", f"The {who.hero} was called {who.name}."),
        ("Who was the hero of the story?", with_article(f"The hero was a {who.hero} named {who.name}.")),
        (f"Who was {who.name}?", with_article(f"{who.name} was a {who.hero}.")),
        ("That was a nice story", "Thank you! I am glad that you liked it."),
        ("I liked that story", "Thank you! I am happy that you liked it."),
    ))  # fmt: skip


_GENERIC = (
    "A {x}, a {x}, for you and me, / as fine as anything can be. / I see it shine, I hear it sing, / "
    "a {x} is a lovely thing.",
    "I met a {x} upon my way, / it made a bright and happy day. / And when I came back home at night, / "
    "I dreamed of it till morning light.",
    "If I could have one wish today, / a {x} would come with me to play. / And we would laugh, and we would run, / "
    "and sit together in the sun.",
)


def poem(rng: Random) -> Exchange:
    """Four lines about a subject: written for it, or a pattern that takes any noun."""
    words = sources.word_lists()
    draw = rng.random()
    if draw < 0.65:
        item = rng.choice(sources.titled("poems.txt", "/"))
        subject, lines = item.titles[0], item.pieces
    else:
        noun = rng.choice(words["animals"] + words["objects"] + words["people"])
        subject = f"a {noun}"
        lines = tuple(line.strip() for line in rng.choice(_GENERIC).format(x=noun).split("/"))
    form = rng.choice((
        "Write a poem about {x}", "Write a poem about {x}", "Write a short poem about {x}", "A poem about {x}",
        "Tell me a poem about {x}", "Can you write a poem about {x}?", "Give me a poem about {x}",
        "I want a poem about {x}", "Please write me a poem about {x}", "Make a poem about {x}",
        "Make up a rhyme about {x}",
    )).format(x=subject)  # fmt: skip
    fixed = False
    if draw < 0.15:
        form, fixed = (
            rng.choice(("Write a poem", "Tell me a poem", "Can you write a poem?", "Write me a short poem")),
            True,
        )
    return Exchange(with_article(form), with_article("\n".join(capital(line) for line in lines)), "poem", "", (), fixed)
