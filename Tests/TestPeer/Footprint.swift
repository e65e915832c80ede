import Glibc

/// The resources of this process.
struct Footprint {
  var descriptors: Int
  var threads: Int
  var residentKiB: Int

  static func now() -> Footprint {
    // Joined threads leave the list a moment later.
    usleep(20_000)
    return Footprint(
      descriptors: entries("/proc/self/fd"), threads: entries("/proc/self/task"),
      residentKiB: readResidentKiB())
  }

  private static func entries(_ path: String) -> Int {
    guard let directory = opendir(path) else { return -1 }
    defer { closedir(directory) }
    var count = 0
    while readdir(directory) != nil { count += 1 }
    return count
  }

  private static func readResidentKiB() -> Int {
    guard let file = fopen("/proc/self/statm", "r") else { return 0 }
    defer { fclose(file) }
    var line = [CChar](repeating: 0, count: 128)
    guard fgets(&line, Int32(line.count), file) != nil else { return 0 }
    let text = line.withUnsafeBufferPointer { String(cString: $0.baseAddress!) }
    return (text.split(separator: " ").dropFirst().first.flatMap { Int($0) } ?? 0) * 4
  }
}
