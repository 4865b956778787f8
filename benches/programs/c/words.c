// A dictionary: strings in a chained hash table that grows, then looked up, changed and emptied.
#include "bench.h"

typedef struct entry {
    struct entry *next;
    char *word, *meaning;
} entry;

static char *copy(const char *text, size_t len) {
    char *string = must(malloc(len + 1));
    memcpy(string, text, len);
    string[len] = 0;
    return string;
}

int main(int argc, char **argv) {
    numbers from = {(uint64_t)argument(argc, argv, 1)};
    enum { WORDS = 400000 };
    size_t slots = 64, used = 0;
    entry **table = must(calloc(slots, sizeof(entry *)));
    char text[200];
    memset(text, 'x', sizeof text);
    for (int pass = 0; pass < 3; pass++) {
        for (int n = 0; n < WORDS; n++) {
            int len = snprintf(text, 40, "word %llu", (unsigned long long)below(&from, WORDS));
            text[len] = 'x';
            uint64_t hash = 1469598103934665603u;
            for (int i = 0; i < len; i++) hash = (hash ^ (unsigned char)text[i]) * 1099511628211u;
            entry **at = &table[hash % slots];
            while (*at && (strncmp((*at)->word, text, (size_t)len) || (*at)->word[len])) at = &(*at)->next;
            if (*at && n % 3 == 0) {
                entry *gone = *at;
                *at = gone->next;
                free(gone->word);
                free(gone->meaning);
                free(gone);
                used--;
            } else if (*at) {
                free((*at)->meaning);
                (*at)->meaning = copy(text, (size_t)len + below(&from, 100));
            } else {
                *at = must(malloc(sizeof(entry)));
                **at = (entry){NULL, copy(text, (size_t)len), copy(text, (size_t)len + below(&from, 100))};
                used++;
            }
            if (used > slots) {
                entry **wider = must(calloc(slots * 2, sizeof(entry *)));
                for (size_t i = 0; i < slots; i++)
                    for (entry *e = table[i], *after; e; e = after) {
                        after = e->next;
                        hash = 1469598103934665603u;
                        for (char *c = e->word; *c; c++) hash = (hash ^ (unsigned char)*c) * 1099511628211u;
                        e->next = wider[hash % (slots * 2)];
                        wider[hash % (slots * 2)] = e;
                    }
                free(table);
                table = wider;
                slots *= 2;
            }
        }
    }
    printf("%zu\n", used);
    for (size_t i = 0; i < slots; i++)
        for (entry *e = table[i], *after; e; e = after) {
            after = e->next;
            free(e->word);
            free(e->meaning);
            free(e);
        }
    free(table);
}
