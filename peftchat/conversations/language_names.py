"""Languages by name and code: two letters (ISO 639-1) for what data sets write in many ways."""

import re
from functools import cache

_TABLE = """
af afr Afrikaans | am amh Amharic | ar ara Arabic | as asm Assamese | az aze Azerbaijani,Azeri | be bel Belarusian
bg bul Bulgarian | bn ben Bengali,Bangla | bo bod,tib Tibetan | br bre Breton | bs bos Bosnian | ca cat Catalan
co cos Corsican | cs ces,cze Czech | cy cym,wel Welsh | da dan Danish | de deu,ger German,Deutsch
dv div Dhivehi,Divehi,Maldivian | dz dzo Dzongkha | el ell,gre Greek | en eng English | eo epo Esperanto
es spa Spanish,Castilian,Español | et est Estonian | eu eus,baq Basque | fa fas,per,prs,pes Persian,Farsi,Dari
fi fin Finnish | tl tgl,fil Filipino,Tagalog | fo fao Faroese | fr fra,fre French,Français | fy fry Frisian
ga gle Irish | gd gla Gaelic | gl glg Galician | gn grn Guarani | gu guj Gujarati | ha hau Hausa
he heb,iw Hebrew | hi hin Hindi | hr hrv Croatian | ht hat Haitian | hu hun Hungarian | hy hye,arm Armenian
id ind,in Indonesian | ig ibo Igbo | is isl,ice Icelandic | it ita Italian,Italiano | ja jpn Japanese
jv jav,jw Javanese | ka kat,geo Georgian | kk kaz Kazakh | km khm Khmer,Cambodian | kn kan Kannada | ko kor Korean
ku kur,kmr,ckb Kurdish | ky kir Kyrgyz,Kirghiz | la lat Latin | lb ltz Luxembourgish | ln lin Lingala | lo lao Lao
lt lit Lithuanian | lv lav,lvs Latvian | mg mlg Malagasy | mi mri,mao Maori | mk mkd,mac Macedonian
ml mal Malayalam | mn mon Mongolian | mr mar Marathi | ms msa,may,zsm Malay | mt mlt Maltese | my mya,bur Burmese
nb nob Bokmål,Bokmal | ne nep,npi Nepali | nl nld,dut Dutch,Flemish | nn nno Nynorsk | no nor Norwegian
ny nya Chichewa,Nyanja | oc oci Occitan | om orm Oromo | or ori,ory Oriya,Odia | pa pan Punjabi,Panjabi
pl pol Polish | ps pus,pbt Pashto | pt por Portuguese,Português | qu que Quechua | rm roh Romansh
ro ron,rum,mo Romanian,Moldavian | ru rus Russian | rw kin Kinyarwanda | sa san Sanskrit | sd snd Sindhi
se sme Sami | si sin Sinhala,Sinhalese | sk slk,slo Slovak | sl slv Slovenian,Slovene | sm smo Samoan | sn sna Shona
so som Somali | sq sqi,alb,als Albanian | sr srp Serbian | st sot Sotho,Sesotho | su sun Sundanese | sv swe Swedish
sw swa,swh Swahili,Kiswahili | ta tam Tamil | te tel Telugu | tg tgk Tajik | th tha Thai | ti tir Tigrinya
tk tuk Turkmen | tn tsn Tswana | tr tur Turkish | tt tat Tatar | ug uig Uyghur,Uighur | uk ukr Ukrainian
ur urd Urdu | uz uzb Uzbek | vi vie Vietnamese | vo vol Volapük | wo wol Wolof | xh xho Xhosa | yi yid,ji Yiddish
yo yor Yoruba | zh zho,chi,cmn,yue,wuu Chinese,Mandarin,Cantonese | zu zul Zulu | hmn hmn Hmong | haw haw Hawaiian
ceb ceb Cebuano | an arg Aragonese | ast ast Asturian
"""
# Macrolanguages stand for their members: data sets write `cmn` and mean `zh`. `sh` is missing: it is mostly a shell.

_TAG = re.compile(r"([a-z]{2,3})(?:[-_]([A-Za-z0-9]{2,8}(?:[-_][A-Za-z0-9]{1,8})*))?", re.IGNORECASE)
_VARIETY = re.compile(r"(?!non\b|not\b)\w+ (\w{4,})", re.IGNORECASE)
_REMARK = re.compile(r"\s*[(,/\[].*")


def language_tag(value: str) -> str | None:
    """The language that a data set or a user means, as a tag such as `en` or `pt-br`; None if it is not a language.

    Understood are names in English, codes of two and three letters, and both with a region or a script behind them:
    `English`, `eng`, `EN_us`, `Chinese (Simplified)`, `Brazilian Portuguese`, `eng_Latn`.
    """
    text = value.strip()
    known = _codes()
    if code := known.get(text.casefold()) or known.get(_REMARK.sub("", text).casefold()):
        return code
    if (variety := _VARIETY.fullmatch(text)) and (code := known.get(variety[1].casefold())):
        return code
    match = _TAG.fullmatch(text)
    if match is None or (code := known.get(match[1].lower())) is None:
        return None
    rest = (match[2] or "").lower().replace("_", "-")
    return f"{code}-{rest}" if rest else code


@cache
def _codes() -> dict[str, str]:
    """Names and codes in small letters -> the code used here."""
    found: dict[str, str] = {}
    for entry in _TABLE.replace("\n", "|").split("|"):
        if entry.strip():
            code, others, names = entry.split(maxsplit=2)
            for name in (code, *others.split(","), *names.strip().split(",")):
                found[name.casefold()] = code
    return found
