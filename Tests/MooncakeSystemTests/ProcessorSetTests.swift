import CLinux
import Glibc
import MooncakeSystem
import MooncakeTestSupport
import Testing

struct ProcessorSetTests {
  /// A processor that this process may use.
  private var usable: Int {
    get throws {
      try #require((0..<1024).first { (try? ProcessorSet(parsing: "\($0)")) != nil })
    }
  }

  @Test func aListNamesItsProcessors() throws {
    let number = try usable
    let set = try ProcessorSet(parsing: "\(number),\(number)-\(number)")
    #expect(set.count == 1 && set.contains(number))
  }

  @Test(arguments: ["", ",", "0,", "x", "-1", "1-0", "0-1-2", "0 ", "99999999999999999999", "1024"])
  func badLists(_ text: String) {
    #expect(throws: ProcessorSet.ParseError.self) { try ProcessorSet(parsing: text) }
  }

  @Test(arguments: ["node:", "node:x", "node:-1", "node:4000000000"])
  func badNodes(_ text: String) {
    #expect(throws: ProcessorSet.ParseError.self) { try ProcessorSet(parsing: text) }
  }

  @Test func processorsThatAreNotOpenAreNamed() throws {
    let absent = try #require((0..<1024).last { (try? ProcessorSet(parsing: "\($0)")) == nil })
    do {
      _ = try ProcessorSet(parsing: "\(absent)")
      Issue.record("processor \(absent) was taken")
    } catch {
      #expect("\(error)".contains("processor \(absent)"))
    }
  }

  @Test func threadsAreBound() throws {
    let number = try usable
    let set = try ProcessorSet(parsing: "\(number)")
    let seen = Box<Int32>(-1)
    let thread = try WorkerThread.start(name: "bound", on: set) { seen.value = sched_getcpu() }
    thread.join()
    #expect(seen.value == Int32(number))
  }
}
