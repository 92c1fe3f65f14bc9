"""Names of languages as requests spell them, in English, in the language itself, and in French, Spanish and German."""

from __future__ import annotations

_TABLE = """
ar arabic العربية arabe árabe arabisch
bg bulgarian български bulgare búlgaro bulgarisch
bn bengali bangla
ca catalan català catalán katalanisch
cs czech čeština tchèque checo tschechisch
cy welsh
da danish dansk danois danés dänisch
de german deutsch allemand alemán deutsche deutschen
el greek ελληνικά grec griego griechisch
en english anglais inglés englisch englische
es spanish español espagnol spanisch spanische castilian
et estonian eesti estnisch
eu basque
fa persian farsi فارسی
fi finnish suomi finnois finlandés finnisch
fr french français francés französisch französische
ga irish gaeilge
he hebrew עברית hébreu hebreo hebräisch
hi hindi हिन्दी
hr croatian hrvatski kroatisch
hu hungarian magyar hongrois húngaro ungarisch
id indonesian
is icelandic
it italian italiano italien italienisch italienische
ja japanese 日本語 japonais japonés japanisch
ka georgian
ko korean 한국어 coréen coreano koreanisch
la latin
lt lithuanian litauisch
lv latvian lettisch
ms malay
nl dutch nederlands néerlandais neerlandés niederländisch holländisch flemish
no norwegian norsk norvégien noruego norwegisch
pl polish polski polonais polaco polnisch
pt portuguese português portugais portugués portugiesisch
ro romanian română roumain rumano rumänisch
ru russian русский russe ruso russisch
sk slovak slovenčina slowakisch
sl slovenian slovene slowenisch
sq albanian
sr serbian српски serbisch
sv swedish svenska suédois sueco schwedisch
sw swahili
ta tamil
te telugu
th thai ไทย thailändisch
tl tagalog filipino
tr turkish türkçe turc turco türkisch
uk ukrainian українська ukrainien ucraniano ukrainisch
ur urdu
vi vietnamese
zh chinese mandarin 中文 chinois chino chinesisch
"""

NAMES: dict[str, str] = {name: line.split()[0] for line in _TABLE.strip().splitlines() for name in line.split()[1:]}
CODES: tuple[str, ...] = tuple(line.split()[0] for line in _TABLE.strip().splitlines())
