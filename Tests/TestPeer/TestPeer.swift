// The peer that tests start in a process of its own:
//   MooncakeTestPeer serve LENGTH PORT   serves memory full of 0x5A over all transports: prints
//                                        "NAME ADDRESS LENGTH", ends when stdin closes
//   MooncakeTestPeer share ...           see SharedMemoryPeer.swift
//   MooncakeTestPeer copy ...            see SharedMemoryPeer.swift
//   MooncakeTestPeer many ..., crowd ... see Crowd.swift
//   MooncakeTestPeer cycles COUNT        creates and destroys engines; fails if any trace stays

import CompletionQueueTransport
import Glibc
import MooncakeEngine
import MooncakeSystem

@main
enum TestPeer {
  static func main() {
    let arguments = CommandLine.arguments.dropFirst()
    do {
      switch (arguments.first, arguments.dropFirst().map { Int($0) }) {
      case ("serve", let numbers) where numbers.count == 2:
        try serve(byteCount: numbers[0] ?? 0, port: UInt16(numbers[1] ?? 0))
      case ("share", _): try SharingPeer(Array(arguments.dropFirst())).run()
      case ("copy", _): try CopyingPeer(Array(arguments.dropFirst())).run()
      case ("many", let numbers) where numbers.count == 2:
        try ManyPeers(count: numbers[0] ?? 0, byteCount: numbers[1] ?? 0).run()
      case ("crowd", _): try Crowd(Array(arguments.dropFirst())).run()
      case ("cycles", let numbers) where numbers.count == 1:
        try EngineCycles(count: numbers[0] ?? 0).run()
      default:
        fail(
          "usage: MooncakeTestPeer serve LENGTH PORT | share ... | copy ... | many COUNT LENGTH"
            + " | crowd ... | cycles N")
      }
    } catch {
      fail("\(error)")
    }
  }

  private static func serve(byteCount: Int, port: UInt16) throws {
    var options = TransferEngine.Options()
    options.port = port
    CQTransport.register
    options.transports.append(CQTransport.name)
    let engine = try TransferEngine(options)
    let memory = try engine.allocate(
      length: UInt64(byteCount), access: [.remoteRead, .remoteWrite])
    memset(memory, 0x5A, byteCount)
    say("\(engine.name) \(UInt(bitPattern: memory)) \(byteCount)")
    var byte: UInt8 = 0
    while read(STDIN_FILENO, &byte, 1) > 0 {}
    engine.close()
  }
}

func say(_ line: String) {
  var text = line + "\n"
  _ = text.withUTF8 { write(STDOUT_FILENO, $0.baseAddress!, $0.count) }
}

func fail(_ line: String) -> Never {
  say(line)
  exit(1)
}
