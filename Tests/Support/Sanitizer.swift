import Glibc

/// What the tests run under.
package enum Sanitizer {
  package static let isThread = dlsym(nil, "__tsan_init") != nil
  package static let isAny = isThread || dlsym(nil, "__asan_init") != nil
}
