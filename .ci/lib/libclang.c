/* Loads a libclang as bindgen does, and parses a header with it.
 *
 *   libclang LIBRARY HEADER [ARGUMENT …]      (arguments of clang: -I, -isystem, …)
 *
 * Ends with 0 if the header was parsed without errors; otherwise prints the first error. */
#include <dlfcn.h>
#include <stdio.h>

typedef struct { const void *data; unsigned flags; } String;

int main(int count, char **arguments) {
    if (count < 3) return 2;
    void *library = dlopen(arguments[1], RTLD_NOW);
    if (!library) { puts(dlerror()); return 1; }
    void *(*create_index)(int, int) = (void *(*)(int, int))dlsym(library, "clang_createIndex");
    void *(*parse)(void *, const char *, const char *const *, int, void *, unsigned, unsigned) =
        (void *(*)(void *, const char *, const char *const *, int, void *, unsigned, unsigned))dlsym(library, "clang_parseTranslationUnit");
    unsigned (*number)(void *) = (unsigned (*)(void *))dlsym(library, "clang_getNumDiagnostics");
    void *(*diagnostic)(void *, unsigned) = (void *(*)(void *, unsigned))dlsym(library, "clang_getDiagnostic");
    int (*severity)(void *) = (int (*)(void *))dlsym(library, "clang_getDiagnosticSeverity");
    String (*spelling)(void *) = (String (*)(void *))dlsym(library, "clang_getDiagnosticSpelling");
    const char *(*text)(String) = (const char *(*)(String))dlsym(library, "clang_getCString");
    if (!create_index || !parse || !number || !diagnostic || !severity || !spelling || !text) {
        puts("it lacks functions of libclang");
        return 1;
    }
    void *unit = parse(create_index(0, 0), arguments[2], (const char *const *)arguments + 3, count - 3, NULL, 0, 0);
    if (!unit) { puts("it cannot parse a header"); return 1; }
    for (unsigned i = 0; i < number(unit); i++) {
        void *found = diagnostic(unit, i);
        if (severity(found) >= 3) { puts(text(spelling(found))); return 1; }
    }
    return 0;
}
