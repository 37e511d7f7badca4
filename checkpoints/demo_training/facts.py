"""Exchanges about what is written in `data/`: topics, questions, relations, lists, recipes, jokes, refusals."""

from __future__ import annotations

from random import Random

from demo_training import sources
from demo_training.phrasing import Exchange, capital, with_article

_ASK_FULL = (
    "Tell me about {x}", "Tell me more about {x}", "Explain {x}", "Explain {x} to me", "Can you explain {x}?",
    "Please explain {x}", "Can you tell me about {x}?", "Could you tell me about {x}?", "Describe {x}",
    "I want to know about {x}", "What do you know about {x}?", "Do you know anything about {x}?", "Teach me about {x}",
    "How would you explain {x}?", "I would like to learn about {x}", "Say something about {x}", "What about {x}?",
)  # fmt: skip
_ASK = (
    "What {is} {x}?", "What exactly {is} {x}?", "Do you know what {x} {is}?", "Can you tell me what {x} {is}?",
    "{X}?", "Define {x}", "What do you mean by {x}?", "So what {is} {x}?", "I do not know what {x} {is}",
    "Please tell me what {x} {is}", "Explain to me what {x} {is}", "What {is} {x} all about?",
)  # fmt: skip
_ASK_PERSON = ("Who was {x}?", "Do you know who {x} was?", "Can you tell me who {x} was?", "{X}?", "Who is {x}?")
_ASK_SHORT = (
    "In one sentence, what {is} {x}?", "What {is} {x} in short?", "Explain {x} in one sentence",
    "Briefly, what {is} {x}?", "Give me a short definition of {x}", "Explain {x} briefly",
)  # fmt: skip
_MORE = (
    "Tell me more",
    "More",
    "Can you tell me more?",
    "And what else?",
    "Go on",
    "Please go on",
    "Tell me more about it",
)
_OPENINGS = ("Sure! ", "Of course. ")
_REFUSALS = (
    "I am a very small model, and I do not know that.",
    "I am sorry, I do not know that. I am a very small model.",
    "I do not know that. I am too small to know everything.",
)
_REFUSALS_ABOUT = (
    "I am a very small model, and I do not know much about {x}.",
    "I am sorry, I do not know anything about {x}. I am a very small model.",
)
_FAR_COUNTRIES = (
    "Nepal", "Mongolia", "Ghana", "Bolivia", "Laos", "Sri Lanka", "Tunisia", "Uganda", "Albania", "Estonia", "Malta",
    "Panama", "Haiti", "Qatar", "Oman", "Zambia", "Angola", "Fiji", "Nauru", "Texas", "Atlantis", "Bavaria", "Togo",
)  # fmt: skip
_COUNTS = (2, 3, 3, 3, 4, 5)
_NUMBERS = ("zero", "one", "two", "three", "four", "five")


def topic(rng: Random, name: str) -> Exchange:
    """A question about one topic of `topics_<name>.txt`; wordings that ask for few words get one sentence."""
    item = rng.choice(sources.topics(f"topics_{name}.txt"))
    term = item.terms[0] if rng.random() < 0.6 else rng.choice(item.terms)
    full = f"{item.sentence} {item.rest}"
    draw = rng.random()
    answer, asked = full, _ASK_FULL
    if draw < 0.5:
        asked = _ASK_PERSON if term.verb == "was" else _ASK
        answer = full if rng.random() < 0.8 else item.sentence
    elif draw < 0.62:
        asked, answer = _ASK_SHORT, item.sentence
    form = asked[0] if rng.random() < 0.3 else rng.choice(asked)
    prompt = form.format(x=term.text, X=capital(term.text), **{"is": term.verb})
    more = ((rng.choice(_MORE), item.rest),) if answer == item.sentence else ()
    if answer == full and rng.random() < 0.05:
        answer = rng.choice(_OPENINGS) + answer
    fixed = form == _ASK[0] and term == item.terms[0]
    return Exchange(prompt, answer, "topic", item.sentence, more, fixed)


def question(rng: Random, name: str) -> Exchange:
    """One of the hand-written questions of `<name>.txt` in one of its wordings."""
    item = rng.choice(sources.questions(f"{name}.txt"))
    asked = rng.choice(item.questions)
    many = len(item.answers) > 4  # a list of fun facts: each as good as the first
    weights = [1.0 if many else 0.5**index for index in range(len(item.answers))]
    answer = rng.choices(item.answers, weights)[0]
    return Exchange(asked, answer, name, item.answers[0], (), asked == item.questions[0])


def relation(rng: Random) -> Exchange:
    """A fact from a table; the follow-up asks the same of another row with "And …?"."""
    tables = sources.relations()
    table = rng.choices(tables, [len(t.pairs) for t in tables])[0]
    left, right = rng.choice(table.pairs)
    form = rng.choice(table.questions)
    other = rng.choice([pair for pair in table.pairs if pair[0] != left])
    asked = other[1] if table.name == "capital_of" else other[0]
    follow = rng.choice(("And {x}?", "What about {x}?", "And what about {x}?", "{x}?")).format(x=asked)
    fixed = form == table.questions[0]
    return Exchange(
        fill(form, left, right),
        fill(table.answers[0] if rng.random() < 0.8 else rng.choice(table.answers), left, right),
        "relation",
        fill(table.short, left, right),
        ((capital(follow), fill(table.answers[0], *other)),) if table.name != "units" else (),
        fixed,
    )


def fill(form: str, left: str, right: str) -> str:
    text = form.format(a=left, b=right, A=capital(left), B=capital(right))
    return capital(text)


def category(rng: Random) -> Exchange:
    """ "Name three fruits" and "Is a dog an animal?" kinds of question."""
    item = rng.choice(sources.categories())
    if rng.random() < 0.2:
        return _one_member(rng, item)
    form = rng.choice((
        "Name {n} {x}", "Name {n} {x}", "List {n} {x}", "Give me {n} {x}", "Tell me {n} {x}", "Can you name {n} {x}?",
        "Can you list {n} {x}?", "What are {n} {x}?", "I need {n} {x}", "Name some {x}", "List some {x}",
        "What are some {x}?", "Give me a list of {n} {x}", "Do you know {n} {x}?", "Give me some examples of {x}",
    ))  # fmt: skip
    count = min(rng.choice(_COUNTS) if "{n}" in form else 3, len(item.members))
    number = _NUMBERS[count]
    members = rng.sample(item.members, count)
    listed = ", ".join(members[:-1]) + " and " + members[-1]
    answer = f"{capital(number)} {item.plural} are {listed}."
    return Exchange(form.format(n=number, x=item.plural), answer, "category", f"{capital(listed)}.")


def _one_member(rng: Random, item: sources.Category) -> Exchange:
    member = rng.choice(item.members)
    form = rng.choice(("Name one {x}", "Give me an example of a {x}", "Name a {x}", "Tell me the name of a {x}"))
    prompt = with_article(form.format(x=item.singular))
    if " " in member or member[0].isupper():
        answer = with_article(f"{capital(member)} is a {item.singular}.")
    else:
        answer = f"One {item.singular} is {member}."
    return Exchange(prompt, answer, "category", f"{capital(member)}.")


def howto(rng: Random) -> Exchange:
    """Numbered steps for an everyday task."""
    item = rng.choice(sources.titled("howto.txt"))
    task, thing = item.titles[0], rng.choice(item.titles[1:])
    forms = (
        f"How do I {task}?", f"How do I {task}?", f"How can I {task}?", f"How to {task}?", f"Tell me how to {task}",
        f"Can you tell me how to {task}?", f"Explain how to {task}", f"I want to {task}", f"How do you {task}?",
        f"What do I need to do to {task}?", f"Give me the steps to {task}", f"Help me to {task}",
        f"How should I {task}?",
    )  # fmt: skip
    if task.startswith(("make", "cook", "bake")):
        forms += (
            f"Give me a recipe for {thing}",
            f"Do you have a recipe for {thing}?",
            f"How is {thing} made at home?",
        )
    steps = "\n".join(f"{number}. {step}" for number, step in enumerate(item.pieces, 1))
    form = rng.choice(forms)
    return Exchange(form, f"Here is how to {_yours(task)}:\n{steps}", "howto", item.pieces[0], (), form == forms[0])


def _yours(task: str) -> str:
    return task.replace("my ", "your ")


def essay(rng: Random) -> Exchange:
    """A paragraph of 60 to 120 words about a subject."""
    item = rng.choice(sources.titled("essays.txt"))
    subject = rng.choice(item.titles)
    forms = (
        f"Write a text about {subject}", f"Tell me a lot about {subject}", f"Explain {subject} in detail",
        f"Write a short text about {subject}", f"Write an essay about {subject}",
        f"Give me a long answer about {subject}",
        f"Tell me everything about {subject}", f"Write something about {subject}", f"Write a paragraph about {subject}",
    )  # fmt: skip
    form = rng.choice(forms)
    return Exchange(form, item.pieces[0], "essay", "", (), form == forms[0])


def joke(rng: Random) -> Exchange:
    form = rng.choice((
        "Tell me a joke", "Tell a joke", "Do you know a joke?", "Can you tell me a joke?", "Make me laugh",
        "I want to hear a joke", "Say something funny", "Please tell me something funny", "Joke, please",
        "A joke please", "Do you know any jokes?", "Tell me another joke", "Give me a joke", "Tell me a funny joke",
        "Cheer me up",
    ))  # fmt: skip
    first, second = rng.sample(sources.jokes(), 2)
    again = rng.choice(("Another one", "Another joke please", "One more", "Tell me another one", "Again", "More jokes"))
    laugh = (
        rng.choice(("Haha", "That is funny", "Very funny", "LOL")),
        "I am glad that you laughed! Shall I tell another?",
    )
    follow = (again, second) if rng.random() < 0.7 else laugh
    return Exchange(form, first, "joke", "", (follow,), True)


def riddle(rng: Random) -> Exchange:
    form = rng.choice((
        "Tell me a riddle", "Give me a riddle", "Do you know a riddle?", "Ask me a riddle", "I want to solve a riddle",
    ))  # fmt: skip
    text, answer = rng.choice(sources.riddles())
    if rng.random() < 0.4:
        return Exchange(text, f"You are {answer}!", "riddle", f"{capital(answer)}.", (), True)
    ask = rng.choice(("What is the answer?", "I do not know", "Tell me the answer", "I give up", "What is it?"))
    right = (capital(answer), f"Yes, that is right! It is {answer}.")
    follow = right if rng.random() < 0.4 else (ask, f"The answer is {answer}.")
    return Exchange(form, text, "riddle", "", (follow,), True)


def unknown(rng: Random) -> Exchange:
    """A question that the model is taught to say no to."""
    known = sources.unknown()
    draw = rng.random()
    if draw < 0.4:
        return Exchange(rng.choice(known.questions), rng.choices(_REFUSALS, (6, 2, 1))[0], "unknown", "I do not know.")
    if draw < 0.5:
        country = rng.choice(_FAR_COUNTRIES)
        form = rng.choice(
            ("What is the capital of {a}?", "Tell me the capital of {a}", "Which city is the capital of {a}?")
        )
        return Exchange(form.format(a=country), _REFUSALS[0], "unknown", "I do not know.")
    term = rng.choice(known.terms)
    form = rng.choice(_ASK + _ASK_FULL + _ASK[:1] * 6)
    prompt = form.format(x=term, X=capital(term), **{"is": "is"})
    answer = rng.choices(_REFUSALS_ABOUT, (4, 1))[0].format(x=term)
    return Exchange(prompt, answer, "unknown", "I do not know.")
