"""What the sample says in English."""

from __future__ import annotations

from minigpt.core.data.sample.world import Tongue, Wordings, lines, wordings

_CAPITAL = wordings("""
    What is the capital of {x}?
    What's the capital of {x}?
    Which city is the capital of {x}?
    Name the capital of {x}.
    Tell me the capital of {x}.
    Do you know the capital of {x}?
    Can you tell me the capital of {x}?
    {x} has which city as its capital?
    What is {x}'s capital?
    What city is {x}'s capital?
    The capital of {x} is which city?
    I want to know the capital of {x}.
    Please name the capital city of {x}.
    What is the capital city of {x} called?
    Capital of {x}?
    held out
    Which city serves as the capital of {x}?
    Could you tell me what the capital of {x} is?
    I forgot the capital of {x}. What is it?
    Please tell me {x}'s capital.
""")
_LANGUAGE = wordings("""
    What language do people speak in {x}?
    Which language is spoken in {x}?
    What is the main language of {x}?
    Tell me the language of {x}.
    Name the language that people speak in {x}.
    Do you know which language is spoken in {x}?
    Can you tell me the language of {x}?
    In {x}, what language do people speak?
    What is the official language of {x}?
    What language is used in {x}?
    People in {x} speak which language?
    I want to know the language of {x}.
    What language would I hear in {x}?
    Which language should I learn for {x}?
    Language of {x}?
    held out
    Which language do people in {x} speak?
    Could you tell me what language is spoken in {x}?
    I am going to {x}. What language do they speak there?
    Please tell me the main language of {x}.
""")
_FOOD = wordings("""
    What is a famous food of {x}?
    What famous food comes from {x}?
    Name a famous food of {x}.
    Tell me a famous food of {x}.
    Which food is {x} famous for?
    What food is {x} known for?
    Do you know a famous food from {x}?
    Can you name a famous dish of {x}?
    What is a typical food of {x}?
    What should I eat in {x}?
    What do people like to eat in {x}?
    I want to try a famous food of {x}.
    In {x}, which food is famous?
    Which dish should I try in {x}?
    Famous food of {x}?
    held out
    Which famous food does {x} have?
    Could you tell me a food that {x} is famous for?
    I am hungry in {x}. What should I eat?
    Please name a typical dish of {x}.
""")
_EATS = wordings("""
    What do {x} eat?
    What do {x} like to eat?
    What is the food of {x}?
    Tell me what {x} eat.
    Do you know what {x} eat?
    Can you tell me what {x} eat?
    What kind of food do {x} eat?
    What food do {x} need?
    Which food do {x} eat?
    I want to know what {x} eat.
    Name the food that {x} eat.
    {x} eat what?
    What do {x} feed on?
    What do hungry {x} look for?
    Food of {x}?
    held out
    What kind of food do {x} like?
    Could you tell me what {x} eat?
    I wonder what {x} eat.
    Please tell me the food that {x} eat.
""")
_HOME = wordings("""
    Where do {x} live?
    Where is the home of {x}?
    What is the home of {x}?
    Tell me where {x} live.
    Do you know where {x} live?
    Can you tell me where {x} live?
    In what kind of place do {x} live?
    Where can I find {x}?
    Where do {x} have their home?
    I want to know where {x} live.
    Name the place where {x} live.
    {x} live where?
    Where can we see {x} in nature?
    Where are {x} at home?
    Home of {x}?
    held out
    In which place do {x} live?
    Could you tell me where {x} live?
    I wonder where {x} live.
    Please tell me where I can find {x}.
""")
_COLOUR = wordings("""
    What colour is {x}?
    What color is {x}?
    What is the colour of {x}?
    Which colour is {x}?
    Tell me the colour of {x}.
    Do you know the colour of {x}?
    Can you tell me what colour {x} is?
    What colour does {x} have?
    Name the colour of {x}.
    {x} has which colour?
    I want to know the colour of {x}.
    What is the color of {x}?
    What colour do we see when we look at {x}?
    Which colour do I need to paint {x}?
    Colour of {x}?
    held out
    Which colour does {x} have?
    Could you tell me the colour of {x}?
    I am painting {x}. What colour is it?
    Please tell me what colour {x} is.
""")
_SUM = wordings("""
    What is {a} + {b}?
    {a} + {b} = ?
    {a} + {b}
    What is {a} plus {b}?
    How much is {a} + {b}?
    How much is {a} plus {b}?
    Add {a} and {b}.
    Calculate {a} + {b}.
    Tell me {a} + {b}.
    Can you add {a} and {b}?
    What do you get for {a} + {b}?
    {a} plus {b} is what?
    What is the sum of {a} and {b}?
    Do you know what {a} + {b} is?
    Work out {a} + {b}.
    I have {a} apples and get {b} more. How many do I have?
    held out
    Please calculate {a} + {b}.
    What does {a} + {b} equal?
    Could you tell me the sum of {a} and {b}?
    What do {a} and {b} make?
""")
_GREETING = wordings("""
    Hello!
    Hi!
    Hi there!
    Hello there!
    Hey!
    Good morning!
    Good evening!
    Good afternoon!
    Hello, how are you?
    Hi, how are you today?
    Hello, minigpt!
    Hi, minigpt!
    Nice to meet you!
    Hey there, how is it going?
    held out
    Hello, nice to meet you!
    Hey, minigpt!
    Hi, good morning!
""")
_IDENTITY = wordings("""
    Who are you?
    What are you?
    What is your name?
    What's your name?
    Tell me your name.
    Tell me about yourself.
    Who am I talking to?
    Please introduce yourself.
    Can you introduce yourself?
    What should I call you?
    Are you a person?
    Are you a language model?
    Which model are you?
    What kind of model are you?
    held out
    Could you tell me who you are?
    May I know your name?
    What model am I talking to?
""")
_ABLE = wordings("""
    What can you do?
    What are you able to do?
    How can you help me?
    Can you help me?
    What do you know?
    Tell me what you can do.
    What can I ask you?
    What are you good at?
    What questions can you answer?
    Which things can you do?
    I need help. What can you do?
    What can you help me with?
    What do you know about?
    What is it that you can do?
    held out
    Could you tell me what you can do?
    What can you do for me?
    Which questions can I ask you?
""")
_THANKS = wordings("""
    Thanks!
    Thank you!
    Thank you very much!
    Thanks a lot!
    Many thanks!
    Thank you for your help!
    Thanks for your help!
    Great, thank you!
    Thanks, that helped me!
    Thank you so much!
    That was helpful, thanks!
    Okay, thank you!
    Thanks for the answer!
    Good answer, thank you!
    held out
    Great, thanks a lot!
    Thank you for the answer!
    Thanks so much!
""")
_GOODBYE = wordings("""
    Bye!
    Goodbye!
    Bye bye!
    See you!
    See you later!
    See you tomorrow!
    Good night!
    I have to go now.
    I have to go, bye!
    Goodbye, minigpt!
    Bye, minigpt!
    Talk to you later!
    That is all for today, bye!
    I am leaving now. Goodbye!
    held out
    Goodbye, see you tomorrow!
    Bye, I have to go now!
    See you later, minigpt!
""")
_STORY = wordings("""
    Tell me a story about {x}.
    Tell a short story about {x}.
    Write a story about {x}.
    Write a short story about {x}.
    Can you tell me a story about {x}?
    I want to hear a story about {x}.
    I would like a story about {x}.
    Do you know a story about {x}?
    Give me a story about {x}.
    Make up a story about {x}.
    Let me hear a story about {x}.
    A story about {x}, please.
    Please tell me a story about {x}.
    Please write a little story about {x}.
    held out
    Could you tell me a short story about {x}?
    Please make up a story about {x}.
    I would love to hear a story about {x}.
""")
_WEATHER = wordings("""
    What is the weather in {c}?
    What's the weather like in {c}?
    How is the weather in {c}?
    How is the weather in {c} today?
    Tell me the weather in {c}.
    Can you check the weather in {c}?
    Check the weather in {c}.
    Is it warm in {c}?
    Is it sunny in {c}?
    I want to know the weather in {c}.
    What is the weather in {c} now?
    Look up the weather in {c}.
    Do you know the weather in {c}?
    Weather in {c}?
    held out
    Could you check the weather in {c}?
    Please tell me the weather in {c}.
    What is the weather like in {c} today?
""")
_CLOCK = wordings("""
    What time is it in {c}?
    What is the time in {c}?
    What's the time in {c}?
    Tell me the time in {c}.
    Can you tell me the time in {c}?
    Do you know what time it is in {c}?
    Check the time in {c}.
    What time is it now in {c}?
    How late is it in {c}?
    I want to know the time in {c}.
    Look up the time in {c}.
    What is the time now in {c}?
    In {c}, what time is it?
    Time in {c}?
    held out
    Could you tell me the time in {c}?
    Please check the time in {c}.
    What time do they have in {c} now?
""")
_CALCULATOR = wordings("""
    Use a tool if you can: what is {a} + {b}?
    Use the calculator: {a} + {b}
    Calculate {a} + {b} with a tool.
    I need the exact sum of {a} and {b}.
    Add {a} and {b} exactly.
    What is the exact value of {a} + {b}?
    Compute {a} + {b} exactly.
    Work out {a} + {b} for me.
    Find the exact sum of {a} and {b}.
    How much is {a} + {b} exactly?
    Please compute {a} + {b}.
    Let the calculator add {a} and {b}.
    Give me the sum of {a} and {b}, please.
    What is {a} plus {b} exactly?
    held out
    Please work out the exact sum of {a} and {b}.
    Could you compute {a} + {b}?
    Find {a} + {b} with the calculator.
""")
_LARGER = wordings("""
    Which is larger, {a} or {b}?
    Which number is larger, {a} or {b}?
    Which is greater, {a} or {b}?
    Which is the larger number: {a} or {b}?
    Compare {a} and {b}. Which is larger?
    Is {a} or {b} larger?
    Tell me the larger one of {a} and {b}.
    Find the larger number: {a}, {b}.
    Of {a} and {b}, which is larger?
    Which is more, {a} or {b}?
    What is the larger one of {a} and {b}?
    Name the larger number of {a} and {b}.
    Is {a} larger, or is {b}?
    {a} or {b}: which is larger?
    held out
    Which of {a} and {b} is larger?
    Between {a} and {b}, which number is larger?
    Please tell me the larger number of {a} and {b}.
""")
_HOP = wordings("""
    What language do people speak in the country whose capital is {c}?
    {c} is the capital of a country. What language do people speak there?
    Which language belongs to the country with the capital {c}?
    The capital of a country is {c}. What is its language?
    What is the language of the country whose capital is {c}?
    Name the language of the country with the capital {c}.
    Tell me the language of the country whose capital is {c}.
    In the country with the capital {c}, what language is spoken?
    Which language is spoken in the country whose capital is {c}?
    A country has {c} as its capital. Which language do people speak there?
    I am in a country whose capital is {c}. What language do I hear?
    If the capital of a country is {c}, what is its language?
    Which language do people speak in the country with the capital {c}?
    Find the language of the country whose capital is {c}.
    held out
    What language is used in the country with {c} as its capital?
    {c} is the capital of a country. Which language is spoken in it?
    Please tell me the language of the country with the capital {c}.
""")

_SAYS = {
    "capital": ("The capital of {x} is {y}.",),
    "language": ("People in {x} speak {y}.",),
    "food": ("A famous food of {x} is {y}.",),
    "eats": ("{x} eat {y}.",),
    "home": ("{x} live in {y}.",),
    "colour": ("{x} is {y}.",),
    "sum": ("{a} + {b} = {y}.",),
    "greeting": ("Hello! How can I help you?", "Hello! What can I do for you?", "Hello! Nice to meet you."),
    "identity": ("I am minigpt, a small language model that was trained from scratch.",),
    "able": ("I am minigpt. I can answer simple questions, add small numbers and tell short stories.",),
    "thanks": ("You are welcome!", "You are welcome! I am glad to help."),
    "goodbye": ("Goodbye! See you soon.", "Goodbye! Have a nice day."),
    "weather": ("The weather in {c} is {y}, {t} degrees.",),
    "clock": ("It is {y} in {c}.",),
}
_PROSE = {
    "capital": lines("""
        {y} is the capital of {x}.
        The capital city of {x} is called {y}.
        The name of {x}'s capital is {y}.
        If you travel to {x}, visit its capital, {y}.
        {x} has a famous capital: {y}.
    """),
    "language": lines("""
        {y} is spoken in {x}.
        The language of {x} is {y}.
        In {x}, people speak {y}.
        Children in {x} learn {y} at school.
        To talk with people in {x}, it helps to know some {y}.
    """),
    "food": lines("""
        In {x}, many people like {y}.
        {x} is famous for {y}.
        One thing to eat in {x} is {y}.
        Visitors to {x} often try {y}.
        When we think of food from {x}, we think of {y}.
    """),
    "eats": lines("""
        {x} like to eat {y}.
        The food of {x} is {y}.
        Hungry {x} look for {y}.
        What do {x} eat? They eat {y}.
        When {x} are hungry, they eat {y}.
    """),
    "home": lines("""
        The home of {x} is in {y}.
        You can find {x} in {y}.
        In nature, {x} live in {y}.
        Where do {x} live? They live in {y}.
        If you want to see {x}, look in {y}.
    """),
    "colour": lines("""
        The colour of {x} is {y}.
        {x} has the colour {y}.
        What colour is {x}? It is {y}.
        If you paint {x}, take {y} paint.
        When children draw {x}, they choose {y}.
    """),
    "sum": lines("""
        {a} plus {b} is {y}.
        The sum of {a} and {b} is {y}.
        If you add {a} and {b}, you get {y}.
        {name} has {a} stones and finds {b} more. Now {name} has {y} in all: {a} + {b} = {y}.
    """),
}
_STORY_SLOTS = {
    "animal": (
        lines("""
            Once upon a time, there was {one} named {name}.
            Long ago, there lived {one} named {name}.
            This is the story of {one} called {name}.
            There once was {one} whose name was {name}.
        """),
        lines("""
            Like other {x}, {name} lived in {home}.
            {x} live in {home}, and so did {name}.
            {name}'s home was in {home}.
        """),
        lines("""
            Every day, {name} ate {food} and played with a friend called {friend}.
            {name} loved to eat {food}, because {x} eat {food}.
            In the morning, {name} looked for {food} and sang a little song.
        """),
        lines("""
            One day, {name} saw {thing}. It was {colour}.
            One morning, {friend} came to visit and showed {name} a picture of {thing}. The picture was {colour}.
            One evening, {name} dreamed of {thing}. In the dream it was {colour}.
        """),
        lines("""
            "How beautiful!" said {name}. "Shall we look at it together?"
            "I have never seen anything so {colour}," said {friend}.
            "I must tell my friends about it," said {name}.
        """),
        lines("""
            {friend} had {a} {berries} and {name} had {b}. They put them together and had {y}.
            {name} gave {friend} {a} {berries}, and later {b} more. Now {friend} had {y}.
            On the way home they counted {a} birds, and then {b} more. "That makes {y}," said {friend}.
        """),
        lines("""
            In the evening, {name} went home and slept well.
            From that day on, {name} and {friend} were best friends.
            They laughed and were happy all day long.
            "What a good day," said {name}, and smiled.
        """),
    ),
    "trip": (
        lines("""
            {name} wanted to see {x}.
            One summer, {name} and {friend} went on a trip to {x}.
            {name} had a dream: a journey to {x}.
            Last year, {name} visited a friend in {x}.
        """),
        lines("""
            First, {name} went to {capital}, the capital of {x}.
            The train stopped in {capital}. "This is the capital of {x}," said {friend}.
            The journey began in the capital, {capital}.
        """),
        lines("""
            People there spoke {language}, so {name} learned a few words.
            Everybody spoke {language}, the language of {x}.
            {name} listened to people who spoke {language}, and liked the sound.
        """),
        lines("""
            For lunch, {name} tried {food}, a famous food of {x}.
            In a small restaurant, {friend} asked for {food}. "{x} is famous for it," said the cook.
            In the evening, there was {food} for everyone.
        """),
        lines("""
            On the first day {name} took {a} pictures, and on the second day {b}. That made {y} pictures.
            {name} wrote {a} letters, and {friend} wrote {b}. Together they wrote {y} letters.
            They saw {a} old houses in the morning and {b} in the afternoon, {y} in all.
        """),
        lines("""
            Then {name} went home and told everybody about {x}.
            "I will come back to {x} one day," said {name}.
            It was a wonderful trip, and {name} never forgot it.
        """),
    ),
}

ENGLISH = Tongue(
    name="en",
    asks={
        "capital": _CAPITAL,
        "language": _LANGUAGE,
        "food": _FOOD,
        "eats": _EATS,
        "home": _HOME,
        "colour": _COLOUR,
        "sum": _SUM,
        "greeting": _GREETING,
        "identity": _IDENTITY,
        "able": _ABLE,
        "thanks": _THANKS,
        "goodbye": _GOODBYE,
        "story": _STORY,
        "weather": _WEATHER,
        "clock": _CLOCK,
        "calculator": _CALCULATOR,
        "larger": _LARGER,
        "hop": _HOP,
    },
    says=_SAYS,
    prose=_PROSE,
    opening="Sure! ",
    formats={
        "only": (
            Wordings(
                ("{q} Answer only.", "{q} Give only the answer.", "{q} No full sentence, please."),
                ("{q} Only the answer, please.",),
            ),
            "{y}",
        ),
        "brackets": (
            Wordings(
                ("{q} Write the answer in brackets.", "{q} Answer in brackets.", "{q} Use square brackets."),
                ("{q} Put the answer in brackets.",),
            ),
            "[{y}]",
        ),
    },
    think={
        "sum": (
            "I add {a} and {b}. Ones: {a1} + {b1} = {s1}. Tens: {a10} + {b10} = {s10}. {s10}0 + {s1} = {y}.",
            "{a} + {b} = {y}.",
        ),
        "larger": ("I compare {a} and {b}. {high} is more than {low}.", "{high} is larger."),
        "hop": ("{c} is the capital of {x}. People in {x} speak {y}.", "People there speak {y}."),
    },
    story=_STORY_SLOTS,
    words={
        "names": ("Anna", "Ben", "Clara", "David", "Ella", "Finn", "Grace", "Henry", "Iris", "Jack", "Lily", "Max"),
        "berries": ("berries", "shells", "leaves", "stones"),
        "skies": ("sunny", "cloudy", "rainy", "windy"),
        "glue": (" ",),
        "openers": (
            "Hi! ",
            "Quick question: ",
            "One more question. ",
            "A friend asked me: ",
            "Something else: ",
            "My teacher wants to know: ",
            "Excuse me. ",
            "Please help me: ",
        ),
        "ones": (
            "a panda",
            "a koala",
            "a rabbit",
            "a lion",
            "a blue whale",
            "a bee",
            "a squirrel",
            "a polar bear",
            "a camel",
            "a frog",
            "a monkey",
        ),
        "tools": ("Adds two numbers exactly.", "Tells the weather of a city.", "Tells the time in a city."),
    },
)
