"""A row of each format of tasks."""

ROWS = {
    "piqa": {"goal": "Boil water", "sol1": "Use heat.", "sol2": "Use ice.", "label": 0},
    "arc": {
        "id": "x",
        "question": "What falls?",
        "choices": {"text": ["rain", "hills", "air"], "label": ["1", "2", "3"]},
        "answerKey": "1",
    },
    "openbookqa": {
        "question_stem": "Plants need",
        "choices": {"text": ["salt", "light"], "label": ["A", "B"]},
        "answerKey": " B",
    },
    "winogrande": {"sentence": "Ann paid Bea because _ was late .", "option1": "Ann", "option2": "Bea", "answer": "2"},
    "hellaswag": {
        "activity_label": "Baking",
        "ctx_a": "[header] How to bake [title] Mix",
        "ctx_b": "the DOUGH",
        "endings": ["rises.  ", "[step] sings  [substeps] well."],
        "label": "0",
    },
    "boolq": {"passage": "Ice floats.", "question": "does ice float", "label": 1},
    "rte": {"sentence1": "Ice floats.", "sentence2": "Ice sinks.", "label": 1},
    "mmlu": {
        "question": " What is 2 + 2? ",
        "subject": "elementary_mathematics",
        "choices": ["three", "four", "five", "six"],
        "answer": 1,
    },
    "lambada": {"text": "He opened the old door"},
    "sciq": {
        "question": "What melts?",
        "support": " Ice is cold.",
        "distractor1": "iron",
        "distractor2": "air",
        "distractor3": "fire",
        "correct_answer": "ice",
    },
    "race": {
        "article": "Tom has a dog.",
        "problems": str(
            [
                {"question": "Tom has  _  .", "options": ["a cat", "a dog", "a cow", "a hen"], "answer": "B"},
                {"question": "Who has it?", "options": ["Ann", "Bea", "Tom", "Zoe"], "answer": "C"},
                {"question": "The dog is  _  .", "options": ["red", "Tom's", "big", "old"], "answer": "B"},
            ]
        ),
    },
    "gsm8k": {"question": "What is 2 + 2?", "answer": "2 and 2 is <<2+2=4>>4.\n#### 4"},
    "ifeval": {
        "prompt": "Write a poem without commas.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"num_words": 3, "relation": "at least", "keywords": None}],
    },
}
