"""Write the made-up sample beside this file: `python examples/data/make.py`.

Every sentence was written for it, and names are invented. Folders, files and columns are those of the real sets (see
benchmarks/data), so that recipes/legal.yaml and recipes/healthcare.yaml run on either. It shows that a run works;
scores on it say nothing about a model.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS = {"train": 60, "valid": 40, "test": 40}
Row = dict[str, Any]  # `input`, `completion`; `choices` where one of them is right

# What a word in braces may become; a word of WORDS may hold further ones.
WORDS: dict[str, list[str]] = {
    "age": [str(n) for n in range(19, 88)],
    "n": [str(n) for n in range(24, 960, 7)],
    "weeks": ["four", "six", "eight", "ten", "twelve", "sixteen", "twenty"],
    "small": ["2", "3", "5", "6", "7", "9", "10", "14"],
    "days": ["15", "30", "45", "60", "90", "120"],
    "money": ["40,000", "75,000", "150,000", "320,000", "900,000", "2,000,000"],
    "year": [str(n) for n in range(1958, 2021)],
    "place": ["Ardle", "Brenmoor", "Castleby", "Dunwick", "Eskham", "Farrowdale", "Glenmere", "Hollin"],
    "firm": ["Aldis Tools", "Bexley Freight", "Corvane Labs", "Dorrit Foods", "Elmstead Glass", "Fenwick Boats"],
    "other": ["Garland Optics", "Harrow Mills", "Ingle Software", "Jarrow Paper", "Kettle Energy", "Larch Hotels"],
    "person": [
        "Abel Marsh",
        "Bina Cole",
        "Carl Osei",
        "Dana Ruiz",
        "Edith Lund",
        "Farid Noor",
        "Greta Hahn",
        "Hugo Sato",
    ],
    "drug": ["alvoxin", "benatril", "cordimab", "dexolam", "elvastine", "fenoprin", "galtrene", "hexamide"],
    "aim": [
        "pain after surgery",
        "morning stiffness",
        "wheezing at night",
        "itching",
        "hours of sleep lost",
        "dizziness",
    ],
    "group": ["adults over 60", "nurses on night shifts", "people new to dialysis", "runners", "office workers"],
    "sign": ["a dull ache", "tingling", "a rash", "swelling", "cramps", "a dry cough", "blurred sight", "tired legs"],
    "part": ["left knee", "lower back", "right wrist", "shoulder", "ankle", "neck", "hip"],
    "habit": ["walking every day", "salt", "coffee", "screen light at night", "swimming", "a softer mattress"],
    "job": ["baker", "bus driver", "carpenter", "gardener", "teacher", "welder", "cook"],
    "court": ["Court of Appeals", "Supreme Court of {place}", "Ninth Division", "Chancery Bench", "Commercial Court"],
    "agency": ["Harbor Board", "Forest Service", "Grain Office", "Bureau of Wells", "Postal Council", "Rail Authority"],
    "thing": ["bridge", "lighthouse", "school library", "reservoir", "ferry pier", "weather station", "grain store"],
    "animal": ["heron", "badger", "otter", "swift", "hedgehog", "toad", "barn owl", "hare"],
    "plant": ["alder", "clover", "barley", "fern", "willow", "mint", "birch", "sorrel"],
    "season": ["spring", "summer", "autumn", "winter"],
    "weather": ["a week of rain", "a late frost", "a dry month", "strong wind from the sea", "heavy snow"],
}

ORGANS = {
    "heart": "pumps blood through the body", "lung": "takes oxygen from the air", "liver": "makes bile",
    "kidney": "filters blood into urine", "stomach": "mixes food with acid", "skin": "keeps germs and water apart",
    "pancreas": "makes insulin", "thyroid": "sets the pace of metabolism", "spleen": "removes old red cells",
    "bladder": "stores urine", "ear": "senses balance", "retina": "turns light into nerve signals",
}  # fmt: skip
CONDITIONS = {
    "neoplasms": "a slowly growing tumor of the {part} was removed and its margins were clear",
    "digestive system diseases": "ulcers of the stomach healed, and bleeding from the bowel stopped",
    "nervous system diseases": "seizures became rarer, and nerve conduction in both arms was measured",
    "cardiovascular diseases": "blood pressure fell, and narrowed arteries of the heart were opened",
    "general pathological conditions": "fever and weight loss were followed without one organ as their source",
}
TREATMENTS = {
    "tennis elbow": "Rest, a strap below the elbow and slow exercises. An injection is a last resort.",
    "a sprained ankle": "Cooling, a firm bandage and raising the leg. Early careful walking helps.",
    "iron deficiency": "Iron tablets for some months. Vitamin C with a meal helps the body take it up.",
    "hay fever": "A nasal spray before the season, antihistamines, and windows closed while pollen flies.",
    "a migraine": "A dark quiet room and a pain reliever taken early. Some people need daily prevention.",
    "athlete's foot": "A cream against fungi for four weeks, dry socks, and shoes that let air in.",
    "gout": "Medicine against the inflammation at first. Later, medicine that lowers uric acid.",
    "a stye": "Warm compresses several times a day. A doctor may open one that does not drain.",
}
HOLDINGS = {
    "notice": "holding that a party who had actual notice of the {days} day limit may not plead that none was sent",
    "waiver": "holding that taking late rent {small} times waives the right to end the lease for lateness",
    "agency": "holding that {firm} is bound by a clerk whom it let sign orders for {small} years",
    "standing": "holding that a neighbor of the {thing} has standing where noise reaches the home",
    "damages": "holding that lost profits of a new business need proof beyond the owner's own estimate",
    "hearsay": "holding that entries of a ship's log made each day are admissible as business records",
    "immunity": "holding that the {agency} is not immune where it sells services as a private firm would",
    "consent": "holding that consent to look into a car does not cover a locked case in its trunk",
}
REASONS = {
    "notice": "The tenant knew of the deadline and yet waited.",
    "waiver": "The landlord cashed each late payment without a word.",
    "agency": "The clerk signed such orders in plain sight of the owners.",
    "standing": "The plaintiff hears the works from her kitchen.",
    "damages": "The shop had been open for one month when the fire came.",
    "hearsay": "The mate wrote every entry on the day itself.",
    "immunity": "The office charged a fee and competed with private carriers.",
    "consent": "The driver agreed that the officers might look into the car.",
}
CLAUSES = {
    "Governing Law": "This Agreement is governed by the laws of the State of {place}.",
    "Audit Rights": "On {days} days' notice {firm} may inspect the books of {other} that concern this Agreement.",
    "Insurance": "{other} shall carry liability insurance of at least ${money} during the term.",
    "Non-Compete": "For {days} days after the term {other} shall not sell like goods within {small} miles of {place}.",
    "Cap On Liability": "The liability of {firm} under this Agreement shall not exceed ${money} in total.",
    "Renewal Term": "The term renews for {small} years unless a party objects {days} days before its end.",
    "Termination For Convenience": "{firm} may end this Agreement without cause on {days} days' written notice.",
    "Exclusivity": "During the term {other} shall buy such goods from {firm} and from nobody else.",
    "License Grant": "{firm} grants {other} a license to use the drawings of the {thing} for {small} years.",
}
AREAS = {
    "Armed forces and national security": "sets training standards for reserve units stationed near {place}",
    "Commerce": "requires sellers of used {thing} fittings to state their age to buyers",
    "Crime and law enforcement": "raises penalties for theft of copper from a {thing}",
    "Finance and financial sector": "lets credit unions with assets under ${money} file one report a year",
    "Government operations and politics": "directs the {agency} to publish its contracts within {days} days",
    "Health": "funds clinics in {place} that treat {sign} in {group}",
    "International affairs": "supports a treaty on shared rivers signed with the republic of {place}",
    "Public lands and natural resources": "adds {n} acres of {plant} forest near {place} to a reserve",
    "Taxation": "allows a credit of ${money} for owners who repair a {thing}",
    "Transportation and public works": "authorizes ${money} for a new {thing} on the road to {place}",
}
OVERRULES = [
    "we now overrule {person} v. {firm}, decided in {year}.",
    "to the extent that {firm} v. {other} says otherwise, it is overruled.",
    "the rule of the {year} decision in {firm} v. {person} is no longer good law, and we abandon it.",
    "our holding in {other} v. {person} was mistaken, and we disapprove it today.",
]
KEEPS = [
    "the plaintiff sent the letter {days} days after the accident in {place}.",
    "{person} testified that the {thing} had been closed in {year}.",
    "the {agency} denied the permit, and {firm} appealed to the {court}.",
    "we affirm, for the reasons given in {firm} v. {other}.",
]
SCIENCE = {
    "melts when it is warmed": "ice", "is attracted by a magnet": "iron", "carries seeds for some plants": "wind",
    "gives plants the energy to make sugar": "sunlight", "turns milk sour": "bacteria", "pulls objects to the ground":
    "gravity", "is needed for a fire to burn": "oxygen", "wears rock down over many years": "running water",
    "lets current flow easily": "copper", "keeps a coffee warm the longest": "a foam cup", "reflects most light":
    "a mirror", "breaks dead leaves down": "fungi",
}  # fmt: skip


def main(folder: Path = HERE) -> None:
    """Write every file of the sample into a folder. The same each time."""
    for path, splits in FILES.items():
        area, task = path.split("/")
        rng, seen, make = random.Random(path), set(), MAKERS[path]
        for split in splits:
            lines = []
            while len(lines) < ROWS[split]:
                row = make(rng)
                text = json.dumps(finished(row, task, f"made-up-{task}-{split}-{len(lines):03}"), ensure_ascii=False)
                key = row["input"] + "".join(sorted(row.get("choices", ())))
                if key not in seen:  # no question stands in two splits
                    seen.add(key)
                    lines.append(text)
            file = folder / area / task / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def finished(row: Row, task: str, name: str) -> Row:
    """A row in the columns of the real sets."""
    if task == "text":
        return {"text": row["input"]}
    prompt = f"### Instruction:\n{INSTRUCTIONS[task]}\n\n### Input:\n{row['input']}\n\n### Response:\n"
    choices = {"choices": row["choices"], "answer": row["choices"].index(row["completion"])} if "choices" in row else {}
    return {"prompt": prompt, "completion": row["completion"], "task": task, "id": name, **choices}


def fill(rng: random.Random, text: str) -> str:
    """A text with each word in braces replaced by one of its values, the same one throughout the text."""
    chosen: dict[str, str] = {}
    while match := re.search(r"\{(\w+)\}", text):
        value = chosen.setdefault(match[1], rng.choice(WORDS[match[1]]))
        text = text[: match.start()] + value + text[match.end() :]
    return text


def pick(rng: random.Random, right: str, wrong: list[str], count: int) -> list[str]:
    """So many options in random order, the right one among them."""
    return rng.sample([right, *rng.sample([text for text in wrong if text != right], count - 1)], count)


def paragraphs(*sentences: str) -> Callable[[random.Random], Row]:
    """A maker of plain texts: some of the sentences, in their order."""

    def make(rng: random.Random) -> Row:
        kept = sorted(rng.sample(range(len(sentences)), max(3, len(sentences) - 2)))
        return {"input": fill(rng, " ".join(sentences[index] for index in kept))}

    return make


def pubmedqa(rng: random.Random) -> Row:
    answer = rng.choice(["yes", "yes", "no", "maybe"])
    found = {
        "yes": "Scores for {aim} fell by {small} points more than with placebo, well beyond chance.",
        "no": "Scores for {aim} were the same in both groups at every visit.",
        "maybe": "Scores for {aim} fell in one clinic and rose in the other; the trial was too small to tell why.",
    }[answer]
    text = f"Abstract: We gave {{drug}} to {{n}} {{group}} for {{weeks}} weeks. {found}\n"
    text += "Question: Does {drug} lessen {aim} in {group}?"
    return {"input": fill(rng, text), "completion": answer, "choices": ["yes", "no", "maybe"]}


def meqsum(rng: random.Random) -> Row:
    kind = rng.choice(
        ["What causes {sign} in the {part}?", "Can {drug} cause {sign}?", "Does {habit} make {sign} worse?"]
    )
    text = "SUBJECT: question MESSAGE: Hello, I am a {job}, {age} years old. "
    text += "For {weeks} weeks I have had {sign} in my {part}. "
    text += {
        "W": "Nobody could tell me why. ",
        "C": "It began after I started {drug}. ",
        "D": "I wonder about {habit}. ",
    }[kind[0]]
    question, text = fill(rng, f"{kind}|{text}Thank you for your help.").split("|")
    return {"input": text, "completion": question}


def medmcqa(rng: random.Random) -> Row:
    organ = rng.choice(list(ORGANS))
    asked = rng.choice(["Which organ {}?", "A student asks which organ {}. The answer is", "The organ that {} is the"])
    return {"input": asked.format(ORGANS[organ]), "completion": organ, "choices": pick(rng, organ, list(ORGANS), 4)}


def medabs(rng: random.Random) -> Row:
    label = rng.choice(list(CONDITIONS))
    text = f"A study in {{place}} of {{n}} {{group}}. Over {{weeks}} weeks of {{drug}}, {CONDITIONS[label]}. "
    text += "Side effects were mild."
    return {"input": fill(rng, text), "completion": label, "choices": list(CONDITIONS)}


def medquad(rng: random.Random) -> Row:
    name = rng.choice(list(TREATMENTS))
    asked = rng.choice(
        [
            "What are the treatments for {}?",
            "How is {} treated?",
            "What helps a {job} with {}?",
            "What helps against {} at the age of {age}?",
        ]
    )
    return {"input": fill(rng, asked.replace("{}", name)), "completion": TREATMENTS[name]}


def casehold(rng: random.Random) -> Row:
    right = rng.choice(list(HOLDINGS))
    options = [fill(rng, text) for text in HOLDINGS.values()]
    answer = options[list(HOLDINGS).index(right)]
    text = (
        f"{{person}} appeals to the {{court}}. {REASONS[right]} The question is settled. "
        "See {firm} v. {other} ({year}) (<HOLDING>). The judgment of {place} is affirmed."
    )
    return {"input": fill(rng, text), "completion": answer, "choices": pick(rng, answer, options, 5)}


def billsum(rng: random.Random) -> Row:
    area = AREAS[rng.choice(list(AREAS))]
    text = (
        'SEC. 1. Short title. This Act may be cited as the "{place} {thing} Act". '
        f"SEC. 2. Program. (a) In general. This Act {area}. "
        "(b) Report. Not later than {days} days after the date of enactment, the {agency} shall report to Congress."
        f"|{{place}} {{thing}} Act - This bill {area}. The {{agency}} must report to Congress within {{days}} days."
    )
    bill, summary = fill(rng, text).split("|")
    return {"input": bill, "completion": summary}


def cuad(rng: random.Random) -> Row:
    kind = rng.choice(list(CLAUSES))
    return {"input": fill(rng, CLAUSES[kind]), "completion": kind, "choices": pick(rng, kind, list(CLAUSES), 5)}


def overruling(rng: random.Random) -> Row:
    answer = rng.choice(["yes", "no"])
    return {
        "input": fill(rng, rng.choice(OVERRULES if answer == "yes" else KEEPS)).lower(),
        "completion": answer,
        "choices": ["yes", "no"],
    }


def bill_topic(rng: random.Random) -> Row:
    area = rng.choice(list(AREAS))
    return {
        "input": fill(rng, f"{{place}} Act of {{year}}. This bill {AREAS[area]}."),
        "completion": area,
        "choices": list(AREAS),
    }


def science(count: int) -> Callable[[random.Random], Row]:
    def make(rng: random.Random) -> Row:
        fact = rng.choice(list(SCIENCE))
        asked = rng.choice(
            ["Which of these {}?", "What {}?", "A class in {place} looks for something that {}. What is it?"]
        )
        answer = SCIENCE[fact]
        choices = pick(rng, answer, list(SCIENCE.values()), count)
        return {"input": fill(rng, asked.replace("{}", fact)), "completion": answer, "choices": choices}

    return make


INSTRUCTIONS = {
    "pubmedqa": "Choose the answer for the following medical Question based on the provided Abstract "
    "from 'yes', 'no', 'maybe'.",
    "meqsum": "Summarize the following question from a patient.",
    "medmcqa": "Answer the following medical exam question.",
    "medabs": f"Classify the condition described by the medical abstract. Choose one of: {', '.join(CONDITIONS)}.",
    "medquad_qa": "Answer the following health question.",
    "casehold": "A US court opinion cites another case; the citation's holding was replaced by <HOLDING>. "
    "State the holding.",
    "billsum": "Summarize the following bill.",
    "cuad_clause": "Name the type of the following contract clause.",
    "overruling": "Does the following sentence from a US court opinion overrule an earlier decision? Answer yes or no.",
    "bill_topic": f"Name the policy area of the following bill summary. Choose one of: {'; '.join(AREAS)}.",
    "arc_easy": "Answer the following science question.",
    "qasc": "Answer the following science question.",
}
MAKERS: dict[str, Callable[[random.Random], Row]] = {
    "healthcare/pubmedqa": pubmedqa,
    "healthcare/meqsum": meqsum,
    "healthcare/medmcqa": medmcqa,
    "healthcare/medabs": medabs,
    "healthcare/medquad_qa": medquad,
    "healthcare/text": paragraphs(
        "People who work as a {job} often notice {sign} in the {part} by the age of {age}.",
        "It usually begins slowly and is worse in the {season}.",
        "A doctor asks about {habit} and looks at the {part} from all sides.",
        "Most people need no pictures of the {part}, since the story is clear enough.",
        "Rest for {small} days and gentle movement come first.",
        "If {sign} lasts longer than {weeks} weeks, {drug} may be tried under supervision.",
        "Fever, numbness or sudden weakness are reasons to come back the same day.",
    ),
    "legal/casehold": casehold,
    "legal/billsum": billsum,
    "legal/cuad_clause": cuad,
    "legal/overruling": overruling,
    "legal/bill_topic": bill_topic,
    "legal/text": paragraphs(
        "§ {n}. Duties of the {agency}.",
        "(a) In general. The {agency} shall keep a public record of every {thing} in the district of {place}.",
        "(b) Fees. A fee of not more than ${money} may be set for an entry.",
        "(c) Notice. An owner shall report a change of ownership within {days} days.",
        "(d) Penalty. Whoever knowingly makes a false entry is liable for a civil penalty of ${money}.",
        "(e) Review. An order under this section may be reviewed by the {court}.",
        "(f) Funds. Sums received under this section remain available for {small} years.",
    ),
    "general/text": paragraphs(
        "The {thing} at {place} was built in {year} after {weather} had destroyed the old one.",
        "{person}, a {job}, drew the first plans on the back of a letter.",
        "Its walls are of local stone, and {plant} grows along the path that leads to it.",
        "In {season} a {animal} can be seen there early in the day.",
        "The town bought it for {money} crowns and opened it to visitors {small} years later.",
        "A fair held every {season} brings about {n} guests.",
        "Since {year} a small museum tells its story.",
    ),
    "general/arc_easy": science(4),
    "general/qasc": science(8),
}
FILES = {path: ("valid", "test") if path.endswith(("arc_easy", "qasc")) else tuple(ROWS) for path in MAKERS}


def files() -> Iterator[str]:
    """The paths that `main` writes, from its folder."""
    yield from (f"{path}/{split}.jsonl" for path, splits in FILES.items() for split in splits)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
