#!/usr/bin/env bash
# lm-eval 0.4.13: wikitext's bits_per_byte divides by the bytes of another text than the one that is scored.
# Guess: words are the original's (so perplexities compare between tokenisations), but bytes are those of the text that the
#   model saw.
# Seen 2026-11-28: the model scores the detokenised text, " @-@ " and all gone; the bytes are counted before that: 103
# counted, 86 scored in this sentence, so bits per byte come out too low. Words count an empty one at both ends, too: 27 for 25.
source "$(dirname "$0")/environment"
packages torch==2.13.0 lm-eval==0.4.13 numpy==2.4.6
check <<'PY'
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

page = " The well @-@ known brand ( founded in 1901 ) sold 1 @,@ 200 cars , 3 @.@ 5 times as many as before . \n"
scored = wikitext_detokenizer({"page": page})
counted = process_results({"page": page}, (-100.0,))
words, counted_bytes = counted["word_perplexity"][1], counted["bits_per_byte"][1]
print(repr(scored), f"{len(scored.encode())} bytes scored, {counted_bytes} counted; {len(page.split())} words, {words} counted")
assert counted_bytes == len(page.encode()) > 1.05 * len(scored.encode())
assert words == len(page.split()) + 2
PY
