"""Phrases that say how an answer was given, by category and language; `native.scoring` looks for all of them in one pass.

Lower case, punctuation left out (an apostrophe stays), matched on whole words; a trailing `*` matches any ending. Languages that write
no spaces are matched anywhere.
"""

from __future__ import annotations

from functools import cache

# refusal: it will not or cannot do what was asked. unknown: it says that it has no answer. hedge: it is not sure of what it says.
# turn: it contradicts or limits what came before. final: it marks its result. negation: it says that something is not so.
CATEGORIES = ("refusal", "unknown", "hedge", "turn", "final", "negation")

PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "refusal": {
        "en": (
            "i cannot", "i can't", "i can not", "i am unable", "i'm unable", "i am not able to", "i'm not able to", "i won't", "i will not",
            "as an ai", "as a language model", "as an artificial intelligence", "i'm sorry", "i am sorry", "sorry but", "i apologize",
            "i apologise", "my apologies", "unable to provide", "unable to answer", "cannot provide", "can't provide", "cannot assist",
            "can't assist", "can't help with", "cannot help with", "not appropriate to", "against my guidelines", "i must decline",
        ),
        "de": (
            "ich kann nicht", "ich kann dir nicht", "ich kann ihnen nicht", "ich kann keine", "ich kann leider", "tut mir leid",
            "es tut mir leid", "als ki", "als sprachmodell", "bin nicht in der lage", "leider kann ich",
        ),
        "fr": (
            "je ne peux pas", "je ne suis pas en mesure", "je suis désolé*", "désolé mais", "en tant qu'ia", "en tant que modèle",
            "malheureusement je ne", "il m'est impossible",
        ),
        "es": (
            "no puedo", "lo siento", "lo lamento", "como modelo de lenguaje", "como una ia", "no me es posible", "no soy capaz",
            "lamentablemente no",
        ),
        "it": ("non posso", "mi dispiace", "come modello linguistico", "come ia", "non sono in grado", "purtroppo non"),
        "pt": ("não posso", "não consigo", "sinto muito", "desculpe mas", "como modelo de linguagem", "como uma ia", "infelizmente não"),
        "nl": ("ik kan niet", "ik kan geen", "het spijt me", "als taalmodel", "als ai", "helaas kan ik"),
        "pl": ("nie mogę", "przykro mi", "przepraszam ale", "jako model językowy", "niestety nie"),
        "ru": ("я не могу", "к сожалению", "извините", "как языковая модель", "как ии", "не в состоянии"),
        "zh": ("我无法", "我不能", "无法提供", "无法回答", "抱歉", "对不起", "作为一个人工智能", "作为ai", "作为人工智能"),
        "ja": ("できません", "申し訳", "お答えできません", "aiとして", "すみませんが"),
        "ko": ("할 수 없습니다", "죄송합니다", "죄송하지만", "인공지능으로서"),
    },
    "unknown": {
        "en": (
            "i don't know", "i do not know", "don't have access", "do not have access", "don't have information", "don't have enough",
            "do not have enough", "do not have information", "not enough information", "no information", "couldn't find", "could not find",
            "can't find", "cannot find", "did not find", "unable to find", "unable to determine", "cannot be determined",
            "can't be determined", "not specified", "not mentioned", "not provided", "not clear", "unclear", "is unknown", "not known",
            "not available", "no specific", "not specify", "not explicitly", "does not provide", "does not mention", "doesn't mention",
            "no record of", "no evidence", "need more context", "more context", "more information", "please provide", "could you clarify",
            "please clarify", "more details", "knowledge cutoff", "real time", "up to date", "i'm not sure", "i am not sure",
        ),
        "de": ("ich weiß nicht", "keine informationen", "nicht bekannt", "nicht genügend", "unklar", "nicht angegeben", "keine angabe*"),
        "fr": ("je ne sais pas", "pas d'information*", "aucune information", "inconnu*", "pas clair", "non précisé*"),
        "es": ("no sé", "no lo sé", "no tengo información", "no hay información", "desconocid*", "no está claro", "no se menciona"),
        "it": ("non so", "non lo so", "nessuna informazione", "sconosciut*", "non è chiaro"),
        "pt": ("não sei", "não tenho informações", "nenhuma informação", "desconhecid*", "não está claro"),
        "nl": ("ik weet het niet", "geen informatie", "onbekend", "niet duidelijk"),
        "pl": ("nie wiem", "brak informacji", "nieznan*", "niejasne"),
        "ru": ("не знаю", "нет информации", "неизвестно", "недостаточно информации", "неясно"),
        "zh": ("不知道", "没有相关信息", "信息不足", "不清楚", "未知", "没有提到", "未提及"),
        "ja": ("わかりません", "分かりません", "不明です", "情報がありません"),
        "ko": ("모르겠", "알 수 없", "정보가 없"),
    },
    "hedge": {
        "en": (
            "maybe", "perhaps", "possibly", "probably", "likely", "might", "may be", "may have", "could be", "it seems", "appears to",
            "seems to", "i think", "i believe", "i guess", "i assume", "it depends", "depends on", "not certain", "uncertain",
            "approximately", "roughly", "around", "about", "some sources", "it is possible", "various", "several", "generally", "typically",
            "usually", "often", "or", "either", "commonly", "believed", "suggest*", "estimated", "such as",
        ),
        "de": (
            "vielleicht", "möglicherweise", "wahrscheinlich", "vermutlich", "könnte", "ich glaube", "ich denke", "es scheint", "etwa",
            "eventuell",
        ),
        "fr": ("peut être", "probablement", "sans doute", "il semble", "je pense", "je crois", "environ", "pourrait"),
        "es": ("quizás", "quizá", "tal vez", "posiblemente", "probablemente", "parece que", "creo que", "podría", "aproximadamente"),
        "it": ("forse", "probabilmente", "possibilmente", "sembra che", "credo che", "penso che", "potrebbe", "circa"),
        "pt": ("talvez", "possivelmente", "provavelmente", "parece que", "acho que", "poderia", "aproximadamente"),
        "nl": ("misschien", "mogelijk", "waarschijnlijk", "ik denk", "het lijkt", "ongeveer"),
        "pl": ("może", "prawdopodobnie", "być może", "wydaje się", "myślę że", "około"),
        "ru": ("возможно", "вероятно", "может быть", "наверное", "кажется", "я думаю", "примерно"),
        "zh": ("可能", "也许", "大概", "或许", "我认为", "似乎", "大约"),
        "ja": ("かもしれません", "おそらく", "多分", "たぶん", "と思います", "約"),
        "ko": ("아마", "일 수 있", "것 같습니다", "추측", "약"),
    },
    "turn": {
        "en": (
            "however", "but", "although", "though", "nevertheless", "on the other hand", "actually", "in fact", "instead", "there is no",
        ),
        "de": ("jedoch", "aber", "allerdings", "obwohl", "dennoch", "tatsächlich"),
        "fr": ("cependant", "mais", "toutefois", "bien que", "néanmoins", "en fait"),
        "es": ("sin embargo", "pero", "aunque", "no obstante", "en realidad"),
        "it": ("tuttavia", "però", "sebbene", "in realtà"),
        "pt": ("no entanto", "contudo", "porém", "embora", "na verdade"),
        "nl": ("echter", "maar", "hoewel", "eigenlijk"),
        "pl": ("jednak", "ale", "chociaż", "w rzeczywistości"),
        "ru": ("однако", "но", "хотя", "на самом деле"),
        "zh": ("但是", "然而", "不过", "虽然"),
        "ja": ("しかし", "ただし", "けれども"),
        "ko": ("그러나", "하지만"),
    },
    "final": {
        "en": ("the answer is", "final answer", "in conclusion", "therefore", "boxed"),
        "de": ("die antwort ist", "die antwort lautet", "zusammenfassend"),
        "fr": ("la réponse est", "en conclusion"),
        "es": ("la respuesta es", "en conclusión"),
        "zh": ("答案是", "综上"),
    },
    "negation": {
        "en": (
            "not", "no", "never", "none", "nor", "cannot", "isn't", "wasn't", "aren't", "weren't", "doesn't", "don't", "didn't", "can't",
            "won't", "wouldn't", "couldn't", "shouldn't", "hasn't", "haven't", "hadn't", "without", "neither", "nobody", "nothing",
        ),
        "de": ("nicht", "kein*", "nie", "niemals", "nichts", "niemand", "ohne", "weder"),
        "fr": ("pas", "jamais", "aucun*", "rien", "sans", "ni", "personne ne"),
        "es": ("no", "nunca", "ningún", "ningun*", "nada", "sin", "tampoco", "jamás"),
        "it": ("non", "mai", "nessun*", "niente", "senza"),
        "pt": ("não", "nunca", "nenhum*", "nada", "sem"),
        "nl": ("niet", "geen", "nooit", "niets", "zonder"),
        "pl": ("nie", "nigdy", "żaden", "bez"),
        "ru": ("не", "нет", "никогда", "ничего", "без"),
        "zh": ("不", "没有", "未", "无"),
        "ja": ("ない", "ません"),
        "ko": ("않", "없"),
    },
}  # fmt: skip


@cache
def patterns() -> list[tuple[int, str]]:
    """(category, text to find) of every phrase, once; spaces stand where a word must begin or end."""
    found: dict[tuple[int, str], None] = {}
    for number, category in enumerate(CATEGORIES):
        for language, phrases in PHRASES[category].items():
            for phrase in phrases:
                spaced = f" {phrase[:-1]}" if phrase.endswith("*") else f" {phrase} "
                found[number, phrase if language in ("zh", "ja", "ko") else spaced] = None
    return list(found)
