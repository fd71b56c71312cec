"""Write the made-up tickets beside this file: `python examples/support-tickets/make.py`."""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
TEAMS = (" billing", " delivery", " returns", " account", " technical")
PRODUCTS = ("kettle", "desk lamp", "headset", "rucksack", "coffee grinder", "bicycle pump", "tent", "keyboard")
OPENINGS = ("Hello,", "Hi there,", "Good morning,", "To whom it may concern,", "Hey,", "")
TICKETS = {
    " billing": (
        "I was charged twice for one {product}.",
        "the invoice for the {product} shows the wrong tax number.",
        "can I pay for the {product} in three parts?",
        "my voucher was not taken off the price of the {product}.",
        "please send a receipt for the {product} to our accounting.",
        "the amount on my card is higher than the price of the {product} on your page.",
    ),
    " delivery": (
        "the {product} should have been here on Monday.",
        "tracking has said 'in transit' for nine days, and I still wait for the {product}.",
        "the courier left the {product} with a neighbour whom I do not know.",
        "can you send the {product} to my office instead?",
        "half of my parcel is missing: the {product} is not in it.",
        "when will the {product} be shipped?",
    ),
    " returns": (
        "I want to send the {product} back, it is not what I expected.",
        "how long do I have to return an unused {product}?",
        "the label for returning the {product} does not print.",
        "I returned the {product} two weeks ago and have no money yet.",
        "can I swap the {product} for another colour?",
        "the {product} was a gift, and I would like to exchange it.",
    ),
    " account": (
        "I cannot log in to see my order of a {product}.",
        "please change the e-mail address under which I bought the {product}.",
        "the link to reset my password has expired, and I need the guarantee of my {product}.",
        "delete my data, I only bought one {product} from you.",
        "someone else ordered a {product} under my name.",
        "my order of a {product} does not show in my profile.",
    ),
    " technical": (
        "the {product} makes a noise since yesterday.",
        "a part of the {product} broke off when I unpacked it.",
        "the {product} stops after five minutes.",
        "which spare parts fit the {product}?",
        "the manual of the {product} is in a language that I do not read.",
        "how do I clean the {product}?",
    ),
}


def files() -> dict[str, list[dict[str, object]]]:
    """File name -> its rows. A customer's tickets are in one file, and test has wordings that train does not have."""
    draw = random.Random(0)
    made: dict[str, list[dict[str, object]]] = {}
    for name, wordings, copies in (("train", slice(0, 4), 12), ("test", slice(4, 6), 8)):
        pairs = [(team, text) for team in TEAMS for text in TICKETS[team][wordings]]
        tickets = pairs * copies
        draw.shuffle(tickets)
        made[f"{name}.jsonl"] = []
        for number, (team, wording) in enumerate(tickets):
            opening, text = draw.choice(OPENINGS), wording.format(product=draw.choice(PRODUCTS))
            made[f"{name}.jsonl"].append(
                {
                    "prompt": f"Ticket: {f'{opening} {text}'.strip()}\nTeam:",
                    "choices": list(TEAMS),
                    "answer": TEAMS.index(team),
                    "customer": f"{name}-{number // 2:03}",
                    "id": f"{name}-{number:03}",
                }
            )
    return made


if __name__ == "__main__":
    for name, lines in files().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
        (HERE / name).write_text(text, encoding="utf-8")
