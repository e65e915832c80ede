/// Uses each global of this module once, as `Fork.prepare` requires.
package enum SystemGlobals {
  package static func use() {
    Resolver.prepare()
    _ = Deadline.never
    _ = Processors.count
    _ = MemoryMapping.pageBytes
  }
}
