"""Which body region a sentence of a CT report is about: a lexicon of organs with a few rules, or any model in its place.

A classifier is a callable: sentences of one report in, as many regions out, "" where a sentence names none. Sentences without
one belong to the region of the sentence before. Nothing is read from the network; the lexicon is English.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence

from jaxmed.errors import UserError

REGIONS = ("chest", "abdomen", "pelvis")
RegionClassifier = Callable[[Sequence[str]], Sequence[str]]
"""Sentences of a report, in order -> the region of each, "" for none"""

# Organ terms: regular expressions without boundaries; where several match, the longest text counts.
_ORGANS = {
    "chest": r"""
        lungs? | \w*pulmonary | pulmonary\ (?:arter(?:y|ies)|trunk|veins?) | lobes? | lobar | lingula\w*
        \w*bronch\w* | airways? | \w*trache\w* | carina\w* | \w*pleura\w* | \w*pleural | costophrenic | cardiophrenic
        \w*mediastin\w* | \w*hilar | hilum | hila | hili | heart | cardiac | cardiomegaly | cardiothoracic
        \w*pericardi\w* | epicardi\w* | myocardi\w* | atri(?:um|a|al) | ventric\w* | coronary(?:\ arter(?:y|ies))?
        LAD | mitral | tricuspid | aortic\ (?:arch|valve|root) | (?:ascending|descending|thoracic)\ aorta
        arch\ of\ the\ aorta | superior\ vena\ cava | SVC | azyg\w* | brachiocephalic | subclavian | paraesophageal
        o?esophag\w* | thyroid(?:\ lobes?)? | lobes?\ of\ the\ thyroid | thymus | thymic | breasts? | mammary
        gyna?ecomastia | axill\w* | ribs? | costal | costochondral | \w*sternum | \w*sternal | manubri\w*
        \w*clavic\w* | scapul\w* | thoracic\ (?:vertebra\w*|spine|spinal|kyphosis|inlet|cage|duct)
        dorsal\ (?:vertebra\w*|spine)
        T(?:1[0-2]|[1-9])(?:-T?(?:1[0-2]|[1-9]))?(?=\ (?:vertebra|level|body|-|compression|and)|\ ?[,.]) | chest\ wall
        pectoral\w* | (?:hemi)?diaphragms? | pneumothora\w* | h(?:a?emo|ydro)thorax | pneumoni\w* | pneumonect\w*
        lobectom\w* | thorac\w+tom\w* | emphysema | atelecta\w* | consolidations? | ground[-\ ]glass | tree-in-bud
        crazy[-\ ]paving | honeycomb\w* | air\ trapping | interlobular
        (?:major|minor|oblique|horizontal|interlobar)\ fissures? | biapical | (?:lung|pulmonary)\ ap(?:ex|ices)
        pacemaker | chest\ tube | sternotom\w* | goit(?:re|er)s?
    """,
    "abdomen": r"""
        liver | \w*hepat\w* | hepatic\ (?:lobes?|hilum|veins?|arter\w+|flexure|segments?)
        lobes?\ of\ (?:the\ )?liver | (?:caudate|quadrate|Riedel'?s?)\ lobe | porta\ hepatis | gall\ ?bladder
        \w*cholecyst\w* | chole(?:lith|doch)\w* | bile | cholangi\w* | biliary | biliary\ tree
        common\ (?:bile\ |hepatic\ )?duct | CBD | \w*pancrea\w* | spleen | splen\w*
        splenic\ (?:hilum|flexure|vein|artery) | \w*adrenal\w* | suprarenal | kidneys? | \w*renal
        (?:extra)?renal\ (?:pelv[ie]s|hilum|cortex|veins?|arter\w+) | pelvis\ of\ (?:the\ )?(?:\w+\ )?kidney
        pelvicali\w+ | pelvicaly\w+ | pelvocali\w+ | collecting\ systems? | cali(?:x|ces|yceal) | calyx | calyces
        caliectasis | \w*nephr\w* | ureter(?:s|al|ic)? | ureteropelvic | stomach
        \w*gastr(?:ic|ium|itis|ectom\w*|o\w*) | pylor\w* | duoden\w* | jejun\w* | ileum | ileal | ileo\w+
        (?:small\ |large\ )?bowels? | intestin\w* | colon | colonic | (?:ascending|transverse|descending)\ colon
        c(?:a|)ec(?:um|al) | append(?:ix|iceal|icitis|ectomy|icular) | mesenter\w* | omentum | omental
        \w*peritone\w* | portal(?:\ (?:veins?|venous|hypertension))? | celiac | coeliac | abdominal\ (?:aorta|wall)
        inferior\ vena\ cava | IVC | lumbar(?:\ (?:vertebra\w*|spine))? | lumbosacral | L[1-5](?:-(?:L?[1-5]|S1))?
        psoas | ascites | \w*umbilic\w* | paracolic | lesser\ sac | Morison'?s? | falciform | rectus\ abdominis
        sub(?:dia)?phrenic | subdiaphragmatic | aorto-?caval | aortic\ bifurcation | para-?aortic
    """,
    "pelvis": r"""
        (?:urinary\ )?bladder | perivesical | vesical | \w*prostat\w* | seminal\ ves\w+ | uter(?:us|i|ine)
        (?:uterine\ )?cervix | endometri\w* | myometri\w* | parametri\w* | ovar(?:y|ies|ian) | adnexa\w* | fallopian
        vagina\w* | (?:recto)?sigmoid(?:\ colon)? | rect(?:um|al) | (?:peri|meso)rect\w+ | anus | anal\ canal
        perianal | ischio\w+ | ischi(?:um|al) | iliac | iliac\ (?:arter\w+|veins?|vessels?|bones?|crest|wings?)
        ilium | inguinal | groins? | \w*sacr(?:um|al) | sacroili\w+ | coccy\w*
        femoral(?:\ (?:heads?|necks?|arter\w+|veins?))? | femurs? | acetabul\w* | hips? | hip\ joints? | pubi[sc]
        pubic\ (?:symphysis|bones?|rami) | symphysis | obturator | perine(?:um|al) | scrot\w* | test(?:is|es|icular)
        penis | spermatic | (?:pouch|cul-de-sac)\ of\ Douglas | Douglas(?:\ pouch)? | cul-de-sac | glute\w+
        buttocks? | vesico-?ureter\w* | ureterovesical\w* | (?:distal|lower|pelvic)\ ureter\w*
        pelvic\ (?:bones?|floor|cavity|girdle|side\ ?walls?|inlet|lymph\ nodes?)
    """,
}
# Words that name a region itself; where one is left beside the organs' terms, it decides.
_WORDS = {
    "chest": r"chest | thorax | thoracic | hemithora\w+ | intrathoracic",
    "abdomen": r"abdomen | \w*abdominal | epigastri\w+ | hypochondri\w+",
    "pelvis": r"pelvis | \w*pelvic | hypogastri\w+",
}


def _terms(text: str) -> list[str]:
    """Expressions that stand apart by `|` or a line's end, outside of brackets."""
    parts, depth, start = [], 0, 0
    for place, char in enumerate(text):
        escaped = text[place - 1 : place] == "\\"
        depth += (char in "([" and not escaped) - (char in ")]" and not escaped)
        if char in "|\n" and not depth:
            parts.append(text[start:place].strip(" \n"))
            start = place + 1
    return [part for part in [*parts, text[start:].strip(" \n")] if part]


_PATTERNS = [
    (re.compile(rf"\b(?:{term})\b", re.IGNORECASE if term.upper() != term else 0), region, explicit)
    for explicit, table in ((False, _ORGANS), (True, _WORDS))
    for region, text in table.items()
    for term in _terms(text)
]
_ANY = re.compile("|".join(rf"(?:{pattern.pattern})" for pattern, _, _ in _PATTERNS), re.IGNORECASE)

_ABBREVIATIONS = frozenset(
    re.findall(
        r"\S+",
        """
    approx ca cf dr e.g eg etc fig figs hx i.e ie inf lat max med min mr mrs ms nos pt resp seg segm st sup vs
""",
    )
)
_END = re.compile(r"[.!?]+[\"')\]]*(?=\s)|\n\s*\n|(?<=[:;])\n|\n(?=\s*(?:[-*•]|\d{1,2}[.)])\s)|。")


def sentences_of(text: str) -> list[str]:
    """Sentences in their order, each in one line; decimals, abbreviations and the numbers of a list do not end one."""
    found, start = [], 0
    for end in _END.finditer(text):
        head = text[start : end.end()]
        if end.group()[0] == "." and _goes_on(head, text[end.end() :]):
            continue
        found.append(head)
        start = end.end()
    lines = (" ".join(sentence.split()) for sentence in [*found, text[start:]])
    return [line for line in lines if line]


def _goes_on(head: str, rest: str) -> bool:
    """Whether the full stop that ends `head` is no end of a sentence."""
    words = head.rstrip(".").split()
    last = words[-1].lstrip("([\"'") if words else ""
    if len(words) == 1 and re.fullmatch(r"\d{1,2}|[a-zA-Z]", last):
        return True  # the number of a list, or "M. psoas"
    if last.lower() in ("no", "im", "se"):  # number, image, series; "no." may be an answer
        return bool(re.match(r"\s*\d", rest))
    return last.lower() in _ABBREVIATIONS


def mentions(sentence: str) -> list[tuple[int, str, bool]]:
    """(place, region, whether it is the region's own word) of each term, in order; of overlapping ones the longest."""
    if not _ANY.search(sentence):
        return []
    spans = [
        (match.start(), match.end(), region, explicit)
        for pattern, region, explicit in _PATTERNS
        for match in pattern.finditer(sentence)
    ]
    kept: list[tuple[int, int, str, bool]] = []
    for span in sorted(spans, key=lambda span: (span[0] - span[1], span[0], span[3])):
        if all(span[1] <= other[0] or span[0] >= other[1] for other in kept):
            kept.append(span)
    return [(start, region, explicit) for start, _, region, explicit in sorted(kept)]


@functools.lru_cache(maxsize=1 << 16)  # reports repeat themselves
def region_of(sentence: str) -> str:
    """The region's own words decide; else the region with the most organs, the one named first among equals; "" for none."""
    found = mentions(sentence)
    named = [region for _, region, explicit in found if explicit] or [region for _, region, _ in found]
    counts = Counter(named)  # in the order of first mention, which `max` keeps among equals
    return max(counts, key=lambda region: counts[region]) if counts else ""


def lexicon(sentences: Sequence[str]) -> list[str]:
    """The classifier that is used unless another one is given."""
    return [region_of(sentence) for sentence in sentences]


def split_report(text: str, classifier: RegionClassifier = lexicon, start: str = "chest") -> dict[str, str]:
    """The report's sentences by region, in their order, joined by a blank; regions without any are left out. `start`: the
    region of sentences before the first that names one."""
    sentences = sentences_of(text)
    regions = list(classifier(sentences))
    if len(regions) != len(sentences) or not set(regions) <= {"", *REGIONS}:
        raise UserError(
            f"the region classifier gave {regions!r} for {len(sentences)} sentences; it must give each of them one of "
            f"{', '.join(REGIONS)}, or '' for none"
        )
    parts: dict[str, list[str]] = {region: [] for region in REGIONS}
    for sentence, region in zip(sentences, regions, strict=True):
        start = region or start
        parts[start].append(sentence)
    return {region: " ".join(part) for region, part in parts.items() if part}
